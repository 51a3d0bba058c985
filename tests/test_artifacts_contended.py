"""Several real processes want the same artifacts: each is built once, and a killed builder blocks nobody."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from magellano import durable
from magellano.names import Stage
from tests.test_artifacts import KEY, ROOT, STAGE, Maker, build, leftovers, store

__all__ = ["store"]  # a fixture


BUILDER = """
import os, sys, time
from pathlib import Path
from magellano.artifacts import Store
from magellano.names import Stage
home, key, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
def make(out):
    (out / "who").write_text(str(os.getpid()))
    (home / f"started-{os.getpid()}").touch()
    time.sleep(seconds)
    return {}
built = Store(home).build(Stage.QUANTIZE, key, version=1, inputs={}, config={}, make=make)
print(built.ref.digest, built.reused)
"""


def builder(home: Path, key: str, seconds: float) -> subprocess.Popen[str]:
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILDER, str(home), key, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for(home: Path, pattern: str) -> None:
    deadline = time.monotonic() + 30
    while not list(home.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern} appeared"
        time.sleep(0.02)


def test_of_eight_processes_one_builds(store):
    eight = [builder(store.home, KEY, 0.5) for _ in range(8)]
    said = [p.communicate(timeout=60)[0].split() for p in eight]
    assert len({digest for digest, _ in said}) == 1
    assert sorted(reused for _, reused in said) == ["False", *["True"] * 7]
    assert len(list(store.home.glob("started-*"))) == 1


def test_a_killed_builder_blocks_none_of_seven_and_one_of_them_builds(store):
    victim = builder(store.home, KEY, 600)
    wait_for(store.home, f"started-{victim.pid}")
    (store.work(STAGE, KEY) / "step-1").write_text("of the victim")
    seven = [builder(store.home, KEY, 0.2) for _ in range(7)]
    time.sleep(0.5)
    assert all(p.poll() is None for p in seven), "they wait"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    said = [p.communicate(timeout=60)[0].split() for p in seven]
    assert sorted(reused for _, reused in said) == ["False", *["True"] * 6]
    assert len(list(store.home.glob("started-*"))) == 2
    assert leftovers(store) == []
    assert not (store.home / "work" / STAGE / KEY).exists()


SWEEPER = """
import sys
from pathlib import Path
from magellano.artifacts import Store
from magellano.names import Stage
store, ours = Store(Path(sys.argv[1])), int(sys.argv[2])
def make(out):
    (out / "file").write_text("text")
    work = store.work(Stage.TRAIN, key)
    (work / "alone").touch(exist_ok=False)  # FileExistsError where somebody else is in this run's folder
    (work / "alone").unlink()
    return {}
for n in range(60):
    key = f"{(n * 7 + ours) % 60:032x}"
    store.build(Stage.TRAIN, key, version=1, inputs={}, config={}, make=make, rerun=f"{ours // 4}" if n % 3 else "")
    assert store.find(Stage.TRAIN, key)
"""


def test_eight_processes_build_sweep_and_build_again_beside_each_other(store):
    """Sixty keys of one stage at once: a builder's sweep must bear that others finish."""
    command = [sys.executable, "-c", SWEEPER, str(store.home)]
    eight = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True, cwd=ROOT) for n in range(8)]
    for process in eight:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
    assert len(list((store.home / "artifacts" / Stage.TRAIN).iterdir())) == 60


def test_an_artifact_that_is_being_replaced_is_there(store, monkeypatch):
    ref, publish, between = build(store, Maker()).ref, durable.publish, threading.Event()

    def slowly(temporary: Path, final: Path) -> None:
        between.set()
        time.sleep(0.5)
        publish(temporary, final)

    monkeypatch.setattr(durable, "publish", slowly)
    again = threading.Thread(target=build, args=(store, Maker()), kwargs={"rerun": "run-1"})
    again.start()
    assert between.wait(10)
    assert not store.path(ref).exists(), "the old one is out of the way, the new one not yet in its place"
    assert store.find(STAGE, KEY) == ref
    again.join()


def test_a_killed_builder_s_rest_is_removed(store, caplog):
    victim = builder(store.home, "v" * 32, 600)
    wait_for(store.home, f"started-{victim.pid}")
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    build(store, Maker(), key="n" * 32)  # any build of the stage sweeps what dead ones left
    assert leftovers(store) == []


def test_a_living_builder_is_left_alone(store):
    living = builder(store.home, "v" * 32, 3)
    wait_for(store.home, f"started-{living.pid}")
    build(store, Maker())
    assert leftovers(store) == [".tmp-" + "v" * 32]
    assert living.communicate(timeout=60)[0].split()[1] == "False"
