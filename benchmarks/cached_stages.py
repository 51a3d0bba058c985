"""What a fine-tune costs whose stages are all there: time of the process, its CPU, and calls to Prefect's server.

    magellano up
    python benchmarks/cached_stages.py [PROFILE [SECTION.KEY=VALUE ...]]      (default: demo; built first where need be)

Prints one JSON object. The server is the one that `magellano up` runs, or that of PREFECT_API_URL.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def inside(profile: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run in this process, its requests counted."""
    import httpx

    calls: Counter[str] = Counter()
    for client in (httpx.Client, httpx.AsyncClient):
        _count(client, calls)
    begun = time.process_time()
    from magellano.commands.train import load_flow

    train = load_flow("train")
    imported, started = time.process_time(), time.perf_counter()
    result = train(profile=profile, overrides=overrides)
    return {
        "stages": len(result["stages"]), "built": [s["stage"] for s in result["stages"] if s["state"] == "built"],
        "flow_s": time.perf_counter() - started, "flow_cpu_s": time.process_time() - imported,
        "imports_cpu_s": imported - begun, "calls": sum(calls.values()), "calls_by_kind": dict(calls.most_common()),
        "server": os.environ.get("PREFECT_API_URL", ""),
    }  # fmt: skip


def _count(client: Any, calls: "Counter[str]") -> None:
    send = client.send

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        calls[f"{request.method} {request.url.path.split('/')[2]}"] += 1
        return send(self, request, *args, **kwargs)

    client.send = counted


def main(profile: str = "demo", *given: str) -> None:
    sys.path.insert(0, str(ROOT))
    from magellano.profile import parse_override

    overrides = dict(map(parse_override, given))
    for _ in range(2):  # the first builds what is missing
        started = time.perf_counter()
        call = f"c.json.dump(c.inside({profile!r}, {overrides!r}), c.sys.stdout)"
        code = f"from benchmarks import cached_stages as c; {call}"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        facts = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"wall_s": time.perf_counter() - started, **facts}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
