"""The registry: who is in force, how back, and a file that is whole whatever happens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from magellano import registry
from magellano.errors import InputError
from magellano.names import Decision
from magellano.registry import Entry

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    return tmp_path


def entry(release: str, decision: Decision = Decision.PROMOTED) -> Entry:
    facts = {"digest": "d", "run": 1, "decided": "now", "reason": "r", "made": "m", "numbers": {}, "lineage": {}}
    return Entry(release=release, decision=decision, **facts)  # type: ignore[arg-type]


def judge(profile: str, *releases: str, decision: Decision = Decision.PROMOTED) -> None:
    for release in releases:
        with registry.changed() as book:
            book.shelf(profile).judge(entry(release, decision))


def back(what: str | None = None) -> str:
    return str(registry.roll_back(what, lambda key: None)["release"])


def test_promoting_and_going_back() -> None:
    judge("demo", "aaa", "bbb")
    judge("demo", "bad", decision=Decision.KEPT_ASIDE)
    judge("demo", "ccc")
    assert registry.current("demo") == "ccc"
    assert back() == "bbb"
    assert back("demo") == "aaa"
    with pytest.raises(InputError, match="no adapter was in force before aaa"):
        back("demo")
    assert back("cc") == "ccc", "any earlier one, by its key"
    judge("demo", "ddd")
    assert back() == "ccc", "what was in force before, not what stands before it in the list"
    with pytest.raises(InputError, match="bad: no promoted adapters start so"):
        back("bad")
    with pytest.raises(InputError, match="is already in force"):
        back("ccc")


def test_it_must_be_clear_which() -> None:
    with pytest.raises(InputError, match="nothing was promoted yet"):
        back()
    judge("demo", "aa1", "aa2")
    judge("other", "bbb")
    with pytest.raises(InputError, match=r"several profiles have promoted adapters \(demo, other\)"):
        back()
    with pytest.raises(InputError, match="2 promoted adapters start so"):
        back("aa")
    with pytest.raises(InputError, match="no promoted adapter of this profile"):
        registry.current("third")


def test_what_cannot_be_used_does_not_come_into_force() -> None:
    judge("demo", "aaa", "bbb")

    def damaged(key: str) -> None:
        raise InputError(f"{key} is damaged")

    with pytest.raises(InputError, match="aaa is damaged"):
        registry.roll_back("demo", damaged)
    assert registry.current("demo") == "bbb"


def test_an_error_changes_nothing(home: Path) -> None:
    judge("demo", "aaa")
    before = registry.path().read_bytes()

    def fail() -> None:
        with registry.changed() as book:
            book.shelf("demo").judge(entry("bbb"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert registry.path().read_bytes() == before
    assert [p.name for p in home.iterdir() if p.is_file()] == ["registry.json"]


ELSEWHERE = json.dumps({"schema": 1, "profiles": {"x": {"held_out": {
    "ref": {"stage": "tokenize", "key": "..", "digest": "", "bytes": 1}, "since": "", "split": {}}}}})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ('{"schema": 9}', "not of schema 1"),
        ('{"schema": 1, "profiles": {"x": {"current": 3}}}', "profiles.x.current"),
        ('{"schema": 1, "profile": {}}', "profile: Extra inputs"),
        ('{"schema": 1, "profiles": {"x": {"current": "../../etc"}}}', "profiles.x.current: String should match"),
        (ELSEWHERE, "profiles.x.held_out.ref"),
    ],
)
def test_what_is_no_registry_is_refused_and_left_alone(text: str, said: str) -> None:
    registry.path().write_text(text)
    with pytest.raises(InputError, match=said), registry.changed():
        pass
    assert registry.path().read_text() == text


ADD = """
import sys
from magellano import registry
from magellano.names import Decision
facts = {"digest": "d", "run": 1, "decided": "now", "reason": "r", "made": "m", "numbers": {}, "lineage": {}}
for name in sys.argv[1:]:
    with registry.changed() as book:
        book.shelf("demo").judge(registry.Entry(release=name, decision=Decision.PROMOTED, **facts))
"""


def test_processes_do_not_lose_each_others_entries() -> None:
    groups = [[f"{process}-{n}" for n in range(10)] for process in range(3)]
    workers = [subprocess.Popen([sys.executable, "-c", ADD, *group], cwd=ROOT) for group in groups]
    assert [w.wait(60) for w in workers] == [0, 0, 0]
    found = json.loads(registry.path().read_text())["profiles"]["demo"]["entries"]
    assert {e["release"] for e in found} == {name for group in groups for name in group}
