"""magellano diff RUN RUN"""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.commands.show import run_argument

if TYPE_CHECKING:
    from rich.console import Console

HELP = "two runs beside each other: settings, data, code, stages and numbers that differ"


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser, "first")
    run_argument(parser, "second")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import tomllib

    from magellano import ledger

    both = [ledger.find(text) for text in (args.first, args.second)]
    texts = [ledger.profile_file(record).read_text(encoding="utf-8") for record in both]
    settings = [{"profile": r.profile, **flat(tomllib.loads(t))} for r, t in zip(both, texts, strict=True)]
    data = [_data(record) for record in both]
    code = [{**r.code, **r.platform, "lock": r.lock} for r in both]
    stages = [{s.name: f"{s.ref.key[:8]} (content {s.ref.digest[:8]})" for s in record.stages} for record in both]
    numbers = [{**r.numbers, **_took(r.took)} for r in both]
    parts = {"settings": settings, "data": data, "code": code, "stages": stages, "numbers": numbers}
    facts: dict[str, Any] = {name: differing(*pair) for name, pair in parts.items()}
    return {"runs": [record.number for record in both], **facts}


def _took(took: dict[str, Any] | None) -> dict[str, Any]:
    return {k: took[k] for k in ("seconds", "kwh", "money")} if took else {}


def _data(record: Any) -> dict[str, Any]:
    """Digests of the data files where the run looked at them, and of all data as the tokens' manifest has it."""
    from magellano.artifacts import Store, home
    from magellano.names import Stage

    found = {f"file {name}": digest[:16] for name, digest in record.data.items()}
    tokens = record.stage(Stage.TOKENIZE)
    store = Store(home())
    if tokens is not None and store.path(tokens.ref).is_dir():
        found["all data"] = store.manifest(tokens.ref)["inputs"]["data"][:16]
    return found


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    rows: dict[str, Any] = {}
    for key, value in table.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def differing(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """What is not the same, as [first, second]; None where one has no such value."""
    keys = [*first, *(key for key in second if key not in first)]
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    first, second = (f"run {number}" for number in facts["runs"])
    for name in ("settings", "data", "code", "stages", "numbers"):
        rows = tuple(
            (key, *map(_said, pair), "" if key.endswith("_percent") else _change(*pair))
            for key, pair in facts[name].items()
        )
        if rows:
            report.Table(name.capitalize(), ("", first, second, "change"), rows).show(console)
        else:
            console.print(f"{name}: the same", highlight=False)


def _said(value: Any) -> str:
    from magellano import report

    return "-" if value is None else report.number(value)


def _change(first: Any, second: Any) -> str:
    plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (first, second))
    return f"{100 * (second / first - 1):+.1f} %" if plain and first else ""
