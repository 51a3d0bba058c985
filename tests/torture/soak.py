"""Two hundred runs in one process: memory, file handles, threads and what lies on the disk stay flat.

`python -m tests.torture.soak RUNS FOLDER` is that process: it prints one JSON object a run.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.torture.outcome import Row, Share

RUNS, WARM = 200, 10
ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
RSS_GROWTH = 24 * MIB  # from the first runs to the last, allocators' and caches' noise included
STORE = 2_000  # bytes in all: times of another length in the manifests
RESULTS, RECORDS = 20_000, 300_000  # bytes a run that may stay: references to artifacts; Prefect's database


def part(share: Share) -> Iterator[Row]:
    from tests.torture import cli, rig

    runs = share.of(RUNS, 3)
    row = Row("a soak in one process, train and evaluate anew each time", "flow `train` with Prefect's own server")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rig.write_profile(folder)
        command = [sys.executable, "-m", "tests.torture.soak", str(runs), name]
        done = subprocess.run(command, cwd=ROOT, env=cli.environment(folder / "home"), capture_output=True, text=True)
        seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        row.tries = len(seen)
        row.check(done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}")
        row.check(len(seen) == runs, f"{len(seen)} of {runs} runs ended")
        for line in rig.unsound(folder / "home") + rig.leftovers(folder / "home"):
            row.check(False, f"at the end: {line}")
        if seen:
            judge(row, seen)
    yield row


def judge(row: Row, seen: list[dict[str, Any]]) -> None:
    warm = min(WARM, len(seen) - 1)
    after, last, runs = seen[warm], seen[-1], max(1, len(seen) - 1 - warm)
    growth = {key: last[key] - after[key] for key in after if key != "digest"}
    row.check(len({one["digest"] for one in seen}) == 1, "the runs gave different adapters")
    row.check(growth["rss"] < RSS_GROWTH, f"resident memory grew by {growth['rss'] / MIB:.1f} MiB")
    row.check(growth["handles"] <= 2, f"{growth['handles']} more file handles")
    row.check(growth["threads"] <= 2, f"{growth['threads']} more threads")
    row.check(growth["store"] < STORE, f"artifacts, locks and work grew by {growth['store']:,} bytes")
    for key, most in (("results", RESULTS), ("database", RECORDS)):
        row.check(growth[key] / runs < most, f"Prefect's {key} grew by {growth[key] / runs:,.0f} bytes a run")
    row.check(growth["mlx"] < 4 * MIB, f"MLX's cache and live arrays grew by {growth['mlx']:,} bytes")
    row.note = (
        f"from run {warm + 1} to {len(seen)}: resident {after['rss'] / MIB:.0f} to {last['rss'] / MIB:.0f} MiB, "
        f"handles {after['handles']} to {last['handles']}, store {growth['store']:+,} bytes, Prefect's results "
        f"{growth['results'] / runs:+,.0f} and database {growth['database'] / runs:+,.0f} bytes a run"
    )


def size(*folders: Path) -> int:
    return sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())


def main(runs: int, folder: Path) -> None:
    from flows.train import train
    from magellano import durable
    from magellano.backend import mx
    from magellano.names import Stage

    home = folder / "home"
    for number in range(runs):
        again = [Stage.TRAIN] if number else []
        result = train(profile=str(folder / "tiny.toml"), rerun=again)
        release = next(s["path"] for s in result["stages"] if s["stage"] == Stage.CHECKPOINT)
        gc.collect()
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        facts = {
            "digest": durable.sha256_file(Path(release) / "adapter_model.safetensors"),
            "rss": rss,
            "handles": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "store": size(home / "artifacts", home / "locks", home / "work"),
            "results": size(home / "results"),
            "database": size(home / "prefect"),
            "mlx": mx.get_cache_memory() + mx.get_active_memory(),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
