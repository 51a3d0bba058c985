"""What a run's page in Prefect's UI has beyond the terminal's report: the adapter in force beside base and new one,
planned memory beside the measured peak, and the way to each artifact.
"""

from typing import Any

from magellano import preference, registry, report
from magellano.names import Stage


def markdown(run: dict[str, Any], links: dict[str, str]) -> str:
    """The page. `run`: what a flow returns; `links`: addresses by a stage's key with `facts` or `report`."""
    tables = [preference.table(run.get("evaluation") or {}), in_force(run), memory(run), pages(run, links)]
    return report.run_markdown(run, [table for table in tables if table.rows])


def in_force(run: dict[str, Any]) -> report.Table:
    """The new adapter against base and the one that is in force, on one held-out set; no rows where that one is not
    there, is the new one itself, or was measured on another set.
    """
    numbers, who = _numbers(run)
    rows = []
    for key, name, form, how in report.MEASURES:
        values: list[Any] = [(numbers.get(of) or {}).get(key) for of in ("base", "promoted", "candidate")]
        if None not in values:
            base, promoted, new = values
            changes = (report.change(base, new, how), report.change(promoted, new, how))
            rows.append((name, *(form.format(value) for value in values), *changes))
    columns = ("measure", "base", "in force", "new", "new against base", "new against in force")
    return report.Table(f"Against the adapter in force{who}", columns, tuple(rows))


def _numbers(run: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The numbers of the run's gate, or the promoted adapter's as they were recorded; and which adapter that is."""
    if (gate := run.get("gate")) and gate["numbers"].get("promoted"):
        return gate["numbers"], ""
    keys = {s["stage"]: s.get("key") for s in run["stages"]}
    shelf = registry.read().shelf(run["profile"])
    entry = shelf.entry(shelf.current)
    measured = run.get("evaluation")
    if entry is None or measured is None or shelf.current == keys.get(Stage.CHECKPOINT):
        return {}, ""
    promoted, new = entry.numbers["candidate"], measured["fine_tuned"]
    if entry.numbers["held_out"] != keys.get(Stage.TOKENIZE) or promoted["tokens"] != new["tokens"]:
        return {}, ""
    return {"base": measured["base"], "promoted": promoted, "candidate": new}, f", {entry.release[:8]}"


def memory(run: dict[str, Any]) -> report.Table:
    """What each training was planned to need and what it took, in GiB of MLX's own count."""
    rows = []
    for stage in run["stages"]:
        summary = stage["summary"]
        if summary.get("peak_gib") is not None and summary.get("planned_gib"):
            planned, peak = summary["planned_gib"], summary["peak_gib"]
            held = f"{summary['held_gib']:.3f}" if summary.get("held_gib") else "no limit"
            rows.append((stage["stage"], f"{planned:.3f}", f"{peak:.3f}", f"{100 * (peak / planned - 1):+.1f} %", held))
    columns = ("stage", "planned GiB", "measured peak GiB", "off by", "held to GiB")
    return report.Table("Memory", columns, tuple(rows))


def pages(run: dict[str, Any], links: dict[str, str]) -> report.Table:
    """A link to each stage's facts and page in the UI."""
    rows = []
    for stage in run["stages"]:
        at = {name: links.get(f"{stage.get('key')} {name}") for name in ("facts", "report")}
        if any(at.values()):
            rows.append((stage["stage"], " ".join(f"[{name}]({link})" for name, link in at.items() if link)))
    return report.Table("Artifacts", ("stage", "pages"), tuple(rows), numbers=False)
