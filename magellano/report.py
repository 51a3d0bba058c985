"""What a reader sees at the end: tables that print in a terminal and as Markdown, and pictures.

matplotlib is imported here alone and only when a picture is drawn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EVALUATION_JSON, EVALUATION_MD, LOSS_PNG, EXPERTS_PNG = "evaluation.json", "evaluation.md", "loss.png", "experts.png"
BASE_COLOUR, TUNED_COLOUR, INK = "#8a8f98", "#1f6feb", "#30363d"


@dataclass(frozen=True)
class Table:
    """A titled table of strings; `numbers`: all columns but the first are right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True

    def markdown(self) -> str:
        """A GitHub-flavoured table under its title as a heading."""
        rule = [":--", *(["--:" if self.numbers else ":--"] * (len(self.columns) - 1))]
        lines = [self.columns, rule, *self.rows]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)

    def show(self, console: "Console") -> None:
        """Print it to a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        head = any(self.columns)
        table = RichTable(
            title=self.title,
            title_justify="left",
            title_style="bold",
            show_header=head,
            box=box.SIMPLE_HEAD if head else box.SIMPLE,
        )
        for number, column in enumerate(self.columns):
            right = number > 0 and self.numbers
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))  # Text: square brackets in samples are no markup
        console.print(table)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


# name in evaluation.json, heading, format of a value, and of the change: a share of the base, or a difference
MEASURES = (
    ("loss", "loss (nats/token)", "{:.4f}", "percent"),
    ("perplexity", "perplexity", "{:.2f}", "percent"),
    ("bits_per_byte", "bits per byte", "{:.4f}", "percent"),
    ("accuracy", "token accuracy", "{:.2%}", "points"),
    ("evenness", "expert evenness", "{:.3f}", "difference"),
)


def measures(evaluation: dict[str, Any]) -> Table:
    """Base against fine-tuned, with the change. `evaluation` is what evaluation.json holds."""
    base, tuned = evaluation["base"], evaluation["fine_tuned"]
    rows = []
    for key, name, form, how in MEASURES:
        if base[key] is not None and tuned[key] is not None:
            rows.append((name, form.format(base[key]), form.format(tuned[key]), change(base[key], tuned[key], how)))
    title = f"Held-out split: {tuned['tokens']:,} target tokens, {tuned['bytes']:,} bytes"
    return Table(title, ("measure", "base", "fine-tuned", "change"), tuple(rows))


def change(base: float, tuned: float, how: str) -> str:
    """The change from `base` to `tuned`, told as MEASURES says."""
    match how:
        case "percent":
            return f"{100 * (tuned / base - 1):+.1f} %" if base else "-"
        case "points":
            return f"{100 * (tuned - base):+.2f} points"
        case _:
            return f"{tuned - base:+.3f}"


def samples(evaluation: dict[str, Any]) -> Table:
    """What both models make of held-out prompts, beside the true completion."""
    columns = ("prompt", "true completion", "base", "fine-tuned")
    rows = [tuple(_short(s[k]) for k in ("prompt", "truth", "base", "fine_tuned")) for s in evaluation["samples"]]
    return Table("Samples from held-out prompts", columns, tuple(rows), numbers=False)


def experts(evaluation: dict[str, Any]) -> Table:
    """Share of token copies per expert in each MoE layer, of the fine-tuned model."""
    uses = evaluation["fine_tuned"]["experts"]
    most = max((len(use["share"]) for use in uses), default=0)
    columns = ("MoE layer", *(f"expert {e}" for e in range(most)), "evenness")
    rows = [(str(n), *(f"{s:.1%}" for s in use["share"]), f"{use['evenness']:.3f}") for n, use in enumerate(uses)]
    return Table("How evenly the experts are used", columns, tuple(rows))


def evaluation_markdown(evaluation: dict[str, Any]) -> str:
    """The evaluation as a page: verdict, measures, samples, experts, pictures beside it."""
    parts = [f"# Evaluation of {evaluation['profile']}", f"**{evaluation['verdict']['text']}**"]
    tables = [measures(evaluation), samples(evaluation), experts(evaluation)]
    parts += [table.markdown() for table in tables if table.rows]
    parts += [f"![{name}]({file})" for name, file in (("loss", LOSS_PNG), ("expert use", EXPERTS_PNG))]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def stages(run: dict[str, Any]) -> Table:
    """One row per stage of a run (see `show_run`); what a stage does not measure stays empty."""
    rows = []
    for stage in run["stages"]:
        summary = stage["summary"]
        speed, peak = summary.get("tokens_per_s"), summary.get("peak_gib")
        rows.append((
            stage["stage"],
            stage["state"],
            duration(stage["seconds"]),
            f"{speed:,.0f}" if speed is not None else "",
            f"{peak:.2f} GiB" if peak is not None else "",
        ))  # fmt: skip
    return Table("Stages", ("stage", "", "time", "tokens/s", "peak memory"), tuple(rows))


def survived(run: dict[str, Any]) -> list[Table]:
    """What went wrong while a run trained and what was done about it; nothing where nothing did."""
    rows = []
    for stage in run["stages"]:
        for fault in stage["summary"].get("faults", ()):
            batch, accumulate = fault["then"]
            smaller = f"{batch} x {accumulate} for {fault['batch']} x {fault['accumulate']}, the same gradient"
            then = "once more" if batch == fault["batch"] else f"micro-batches of {smaller}"
            rows.append((stage["stage"], f"{fault['after_step']:,}", fault["fault"], then, _short(fault["told"], 120)))
    columns = ("stage", "after step", "fault", "from the last checkpoint on", "told")
    return [Table("Survived", columns, tuple(rows), numbers=False)] if rows else []


def accounting(run: dict[str, Any]) -> list[Table]:
    """For each tokenize stage of a run, what became of every row and token, in two lines that balance."""
    return [_books(s["stage"], s["summary"]["accounting"]) for s in run["stages"] if "accounting" in s["summary"]]


def _books(stage: str, counts: dict[str, Any]) -> Table:
    reasons = {f"rejected: {reason}": n for reason, n in counts["rejected"].items()}
    tokens = {"trained": counts["trained"], "prompts": counts["context"]}
    tokens |= {"held out": counts["held_out"], "dropped": counts["dropped"]}
    rows: tuple[tuple[str, str, str], ...] = (
        (
            "rows",
            number(counts["rows_read"]),
            _sum({"used": counts["used"], **reasons, "duplicates": counts["duplicates"]}),
        ),
        ("tokens", number(counts["tokens_in"]), _sum(tokens)),
    )
    if records := counts.get("toon_records", 0):
        before, after = counts["json_tokens"], counts["toon_tokens"]
        left = f"; {counts['toon_kept']:,} stayed JSON" if counts["toon_kept"] else ""
        saved = f"{after:,} tokens in place of {before:,}: {100 * (after - before) / before:+.1f} %{left}"
        rows += (("JSON records as TOON", number(records), saved),)
    for name, part in counts.get("sources", {}).items():
        kept = {"used": part["used"], "rejected": sum(part["rejected"].values()), "duplicates": part["duplicates"]}
        what = f"{name}, weight {part['weight']:g}"
        rows += ((what, number(part["rows_read"]), f"{_sum(kept)}; {part['times']:.2f} times an epoch"),)
    return Table(f"Data of {stage}", ("", "read", "are"), rows, numbers=False)


def _sum(parts: dict[str, int]) -> str:
    return " + ".join(f"{n:,} {name}" for name, n in parts.items())


def run_places(run: dict[str, Any]) -> dict[str, Path]:
    """Where a run's results lie: evaluation, pictures, then each stage's folder."""
    places = {}
    if (evaluation := _evaluation_folder(run)) is not None:
        files = {"evaluation": EVALUATION_MD, "loss curve": LOSS_PNG, "expert use": EXPERTS_PNG}
        places = {name: evaluation / file for name, file in files.items()}
    return places | {stage["stage"]: Path(stage["path"]) for stage in run["stages"]}


def show_run(run: dict[str, Any], console: "Console") -> None:
    """The end of `magellano train`: data, stages, samples, base against fine-tuned, and where everything lies.

    `run` is what a flow returns: {"profile": name, "stages": [{"stage", "state", "seconds", "path", "summary"}, ...]}.
    """
    for table in (*accounting(run), stages(run), *survived(run)):
        table.show(console)
    if (evaluation := _evaluation(run)) is not None:
        show_evaluation(evaluation, console)
    for line in _ending(run):
        console.print(line, highlight=False, markup=False)
    show_places(run_places(run), console)


def run_markdown(run: dict[str, Any], more: Sequence[Table] = ()) -> str:
    """The same as a page for Prefect's UI, with `more` tables after the evaluation."""
    places = facts("Where it lies", {name: str(path) for name, path in run_places(run).items()})
    tables = [*more, stages(run), *survived(run), *accounting(run), _made_from(run), places]
    parts = [f"# {run['profile']}", *(table.markdown() for table in tables)]
    if (evaluation := _evaluation(run)) is not None:
        parts.insert(1, evaluation_markdown(evaluation))
    parts[1:1] = _ending(run)
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _made_from(run: dict[str, Any]) -> Table:
    """Each artifact of a run with those that it was made from."""
    rows = [
        (s["stage"], s.get("key", "")[:8], ", ".join(map(_short_key, s.get("made_from", ())))) for s in run["stages"]
    ]
    return Table("What was made from what", ("stage", "key", "made from"), tuple(rows), numbers=False)


def _short_key(place: str) -> str:
    stage, key = place.split("/")
    return f"{stage} {key[:8]}"


def _ending(run: dict[str, Any]) -> list[str]:
    """The gate's decision, and what the run took, where the run knows."""
    lines = []
    if gate := run.get("gate"):
        lines.append(f"{gate['release'][:8]} {gate['decision']}: {gate['reason']}")
    if run.get("took"):
        lines.append(f"run {run['run']} took {took(run['took'])}")
    return lines


def took(facts: dict[str, Any]) -> str:
    """Time, energy and money of a run, in a line; see magellano.energy."""
    return f"{duration(facts['seconds'])}, {energy(facts)}, {money(facts)} ({facts['how']})"


def energy(facts: dict[str, Any]) -> str:
    """Energy, with ~ where it is an estimate."""
    wh = 1000 * facts["kwh"]
    said = f"{wh:.3g} Wh" if wh < 1000 else f"{facts['kwh']:.3g} kWh"
    return f"~{said}" if facts["estimated"] else said


def money(facts: dict[str, Any]) -> str:
    """Energy and the machine's share, in the currency of the prices."""
    return f"{facts['money']:.{2 if facts['money'] >= 1 else 4}f} {facts['currency']}"


def _evaluation_folder(run: dict[str, Any]) -> Path | None:
    paths = [Path(stage["path"]) for stage in run["stages"] if stage["stage"] == "evaluate"]
    return paths[0] if paths else None


def _evaluation(run: dict[str, Any]) -> dict[str, Any] | None:
    folder = _evaluation_folder(run)
    if folder is None:
        return None
    evaluation: dict[str, Any] = json.loads((folder / EVALUATION_JSON).read_text(encoding="utf-8"))
    return evaluation


def show_evaluation(evaluation: dict[str, Any], console: "Console") -> None:
    """Verdict, measures, samples and expert use, for a terminal."""
    for table in (samples(evaluation), experts(evaluation), measures(evaluation)):
        if table.rows:
            table.show(console)
    console.print(f"[bold]{evaluation['verdict']['text']}[/bold]", highlight=False)


def facts(title: str, values: dict[str, Any]) -> Table:
    """Names and values, one row each."""
    return Table(title, ("", ""), tuple((k.replace("_", " "), number(v)) for k, v in values.items()), numbers=False)


def number(value: Any) -> str:
    """Floats to four significant digits, whole numbers with thousands separators, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_places(paths: dict[str, Path], console: "Console") -> None:
    """One path a line, never wrapped, so that it can be copied; relative to the current folder where it lies below."""
    here = Path.cwd()
    for name, path in paths.items():
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        console.print(f"  {name:<22} {shown}", soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 0.42 s, 12.3 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """Bytes as a reader says them: 512 B, 1.5 MiB, 22.4 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _short(text: str, limit: int = 240) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:
        return [json.loads(line) for line in lines[:-1]]


def loss_picture(out: Path, curves: dict[str, list[dict[str, Any]]], base_loss: float, tuned_loss: float) -> None:
    """One panel per training run in `curves` (its metrics); the last, the fine-tune, carries both evaluations."""
    drawn, axes = figure(max(len(curves), 1), "step", "loss (nats/token)")
    for axis, (name, lines) in zip(axes, curves.items(), strict=False):
        steps = [line for line in lines if "loss" in line]
        axis.plot([s["step"] for s in steps], [s["loss"] for s in steps], color=TUNED_COLOUR, lw=1.6, label="training")
        held_out = [line for line in lines if "held_out_loss" in line]
        if held_out:
            values = [h["held_out_loss"] for h in held_out]
            axis.plot([h["step"] for h in held_out], values, "o", ms=4, color=INK, label="held out")
        axis.set_title(name, loc="left", color=INK)
    axes[-1].axhline(base_loss, color=BASE_COLOUR, ls="--", lw=1.2, label=f"base, held out: {base_loss:.3f}")
    axes[-1].axhline(tuned_loss, color=TUNED_COLOUR, ls="--", lw=1.2, label=f"fine-tuned, held out: {tuned_loss:.3f}")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    save(drawn, out)


def experts_picture(out: Path, base: Sequence[dict[str, Any]], tuned: Sequence[dict[str, Any]]) -> None:
    """Share per expert, base beside fine-tuned, one panel per MoE layer; the dashed line is an even share."""
    shown = min(len(tuned), 12)
    drawn, axes = figure(max(shown, 1), "expert", "share of token copies")
    for n in range(shown):
        shares = base[n]["share"], tuned[n]["share"]
        for offset, share, colour, name in zip(
            (-0.2, 0.2), shares, (BASE_COLOUR, TUNED_COLOUR), ("base", "fine-tuned"), strict=True
        ):
            axes[n].bar([e + offset for e in range(len(share))], share, width=0.4, color=colour, label=name)
        axes[n].axhline(1 / len(shares[1]), color=INK, ls="--", lw=1)
        axes[n].set_xticks(range(len(shares[1])))
        axes[n].set_title(f"MoE layer {n}: evenness {tuned[n]['evenness']:.3f}", loc="left", color=INK)
    if shown:
        axes[0].legend(frameon=False, fontsize=8)
    else:
        axes[0].set_title("this model has no MoE layer", loc="left", color=INK)
    save(drawn, out)


def trace_picture(out: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Where a step's time and memory go: a bar for each part, the largest on top."""
    drawn, axes = figure(2, "ms", "")
    axes[0].set_title(title, loc="left", color=INK)
    axes[1].set(xlabel="MB beside what is held")
    for axis, key in zip(axes, ("ms", "extra_mb"), strict=True):
        shown = [row for row in reversed(rows) if key in row]
        axis.barh([row["part"] for row in shown], [row[key] for row in shown], color=TUNED_COLOUR)
        axis.grid(axis="y", alpha=0)
        axis.grid(axis="x", alpha=0.25)
    save(drawn, out)


def figure(panels: int, x: str, y: str) -> tuple[Any, list[Any]]:
    """A figure of so many panels, three in a row, and their axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, 3)
    rows = -(-panels // columns)
    drawn = Figure(figsize=(max(5.5, 4.6 * columns), 3.6 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set(xlabel=x, ylabel=y)
    return drawn, axes[:panels]


def save(figure: Any, out: Path) -> None:
    """No date goes into the file: the same numbers make the same picture."""
    figure.savefig(out, metadata={"Software": None})
