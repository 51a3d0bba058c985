"""Base against fine-tuned on lm-eval's tasks, for a reader, from what evaluation.json holds; lm-eval is not needed."""

from typing import Any

from magellano.report import Table

BETTER = {True: " ↑", False: " ↓", None: ""}


def table(rows: list[dict[str, Any]]) -> Table:
    """`rows` as `harness.compare` gives them; values with their standard errors."""
    lines = []
    for row in rows:
        kept = "" if row["filter"] == "none" else f", {row['filter']}"
        base, tuned = row["base"], row["fine_tuned"]
        change = "" if base is None or tuned is None else _with_error(tuned - base, row["change_stderr"], "+")
        lines.append((
            row["task"],
            "" if row["samples"] is None else f"{row['samples']:,}",
            f"{row['metric']}{kept}{BETTER[row['higher_is_better']]}",
            _with_error(base, row["base_stderr"]),
            _with_error(tuned, row["fine_tuned_stderr"]),
            change,
        ))  # fmt: skip
    columns = ("task", "samples", "measure", "base", "fine-tuned", "change")
    return Table("Tasks of lm-eval, with standard errors (↑ more is better)", columns, tuple(lines), numbers=False)


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")
