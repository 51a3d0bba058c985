"""What Prefect's UI shows of a finished stage: a table of facts, pages and pictures. Best effort, bounded in time."""

import base64
import re
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from magellano import report, run_page
from magellano.artifacts import ArtifactRef, Store
from magellano.names import Stage
from tasks import background, settings

_links: dict[str, str] = {}  # of this process: addresses in the UI by an artifact's key with `facts` or `report`
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([\w.-]+\.png)\)")


def stage_artifacts(store: Store, ref: ArtifactRef, reused: bool) -> None:
    """Store the stage's table, its Markdown pages and its pictures with the current task run, where people look."""
    if not settings.watched():
        return
    folder, stage = store.path(ref), ref.stage.replace("_", "-")
    rows = facts_table(store.manifest(ref)["summary"], ref, folder, reused)

    def publish() -> None:
        made: Any = create_table_artifact(
            table=rows, key=f"{stage}-facts", description=f"{stage}: {'reused' if reused else 'built'} {ref.key}"
        )
        _links[f"{ref.key} facts"] = f"/artifacts/artifact/{made}"
        if text := pages(folder):
            made = create_markdown_artifact(
                markdown=text, key=f"{stage}-report", description=f"{stage}: what it wrote to be read"
            )
            _links[f"{ref.key} report"] = f"/artifacts/artifact/{made}"

    background.attempt(f"{stage} artifacts", publish)


def run_report(run: dict[str, Any]) -> None:
    """Store what a run came to (see magellano.run_page) with the current flow run, where people look."""
    if not settings.watched():
        return
    folder = next((Path(s["path"]) for s in run["stages"] if s["stage"] == Stage.EVALUATE), None)
    page = run_page.markdown(run, _links)
    text = _with_pictures(page, folder)[0] if folder else page

    def publish() -> None:
        create_markdown_artifact(markdown=text, key="run-report", description=f"run {run['run']}: all of it on a page")

    background.attempt("the run's report", publish)


def facts_table(summary: dict[str, Any], ref: ArtifactRef, folder: Path, reused: bool) -> list[dict[str, str]]:
    """Rows of name and value: the summary's plain values (nested ones by dotted name), then where the artifact lies."""
    faults = report.survived({"stages": [{"stage": ref.stage.value, "summary": summary}]})
    told = {
        f"survived {n}": ", ".join(("after step " + row[1], *row[2:]))
        for table in faults
        for n, row in enumerate(table.rows, 1)
    }
    rows = {**_leaves(summary), **told, "state": "reused" if reused else "built", "key": ref.key, "digest": ref.digest}
    rows |= {"bytes": f"{ref.bytes:,}", "folder": str(folder)}
    return [{"fact": name, "value": value} for name, value in rows.items()]


def pages(folder: Path) -> str:
    """The folder's Markdown pages with their pictures inside (as data: URIs), then its other pictures."""
    shown: set[str] = set()
    parts = []
    for page in sorted(folder.glob("*.md")):
        text, names = _with_pictures(page.read_text(encoding="utf-8"), folder)
        parts.append(text)
        shown |= names
    parts += [_inline(path.stem, path) for path in sorted(folder.glob("*.png")) if path.name not in shown]
    return "\n\n".join(parts)


def _with_pictures(text: str, folder: Path) -> tuple[str, set[str]]:
    """`text` with the pictures of `folder` that it names inside it, and their names."""
    shown: set[str] = set()

    def inside(match: re.Match[str]) -> str:
        name = match[2]
        if not (folder / name).is_file():
            return match[0]
        shown.add(name)
        return _inline(match[1], folder / name)

    return _PICTURE.sub(inside, text), shown


def _inline(title: str, picture: Path) -> str:
    return f"![{title}](data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()})"


def _leaves(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    rows: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, dict):
            rows |= _leaves(item, f"{prefix}{name}.")
        elif not isinstance(item, list):  # lists are for the artifact's files
            rows[prefix + name] = f"{item:,.6g}" if isinstance(item, float) else str(item)
    return rows
