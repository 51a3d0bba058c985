"""magellano up"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "start Prefect's server and a worker of this home, with the pool and all deployments"


def site_arguments(parser: argparse.ArgumentParser) -> None:
    """--only, which up and down share."""
    parser.add_argument("--only", choices=["server", "worker"], help="this part alone; without: both")


def arguments(parser: argparse.ArgumentParser) -> None:
    site_arguments(parser)
    parser.add_argument("--pool", default="gpu", help="the work pool of this class of machines (default: gpu)")
    parser.add_argument(
        "--nightly", action="append", default=[], metavar="PROFILE", help="turn the schedule of nightly/PROFILE on"
    )
    parser.add_argument(
        "--foreground", action="store_true", help="with --only: stay here as that part, for systemd and launchd"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import history, site
    from magellano.errors import InputError

    api, parts = site.url(), [site.Part(args.only)] if args.only else list(site.Part)
    if args.foreground and not args.only:
        raise InputError("--foreground: give --only server or --only worker with it; one process is one part")
    if args.only == site.Part.SERVER and args.nightly:
        raise InputError(
            "--nightly: schedules stand with the deployments, which come with the worker; leave --only out"
        )
    started = []
    if site.Part.SERVER in parts:
        there = _is_there(api)
        if site.is_ours(api):
            site.tell_prefect(api)
        if not there and args.foreground:
            site.become(site.Part.SERVER, api)
        if not there:
            site.start(site.Part.SERVER, api)
            started.append("server")
            site.wait_healthy(api)  # whatever is typed next finds it
    said: list[str] = []
    if site.Part.WORKER in parts:
        for setting in (site.look_every, site.restarts, history.keep_days):
            setting()  # a mistake in one is told here, not in a log
        if started or site.running(site.Part.SERVER):
            site.wait_healthy(api)
        elif not site.healthy(api):
            raise InputError(f"{api}: no server answers; start it, or set PREFECT_API_URL to the one to use")
        ours = site.running(site.Part.SERVER) is not None
        if args.nightly and not ours:
            raise InputError(f"--nightly: {api} is another machine's; turn its schedules on there, or in its UI")
        said = site.helper("deploy", api, args.pool, *(["all", *args.nightly] if ours else []))
        if args.foreground:
            site.become(site.Part.WORKER, api, args.pool)
        if site.running(site.Part.WORKER) is None:
            site.start(site.Part.WORKER, api, args.pool)
            started.append("worker")
    return {
        "url": api, "ui": api.removesuffix("/api"), "started": started, "said": said, "logs": str(site.folder()),
        "prefect": site.prefect_knows(),
    }  # fmt: skip


def _is_there(api: str) -> bool:
    """Whether a server is to be used as it is. InputError where a stranger has our address."""
    from magellano import site
    from magellano.errors import InputError

    if site.running(site.Part.SERVER) is not None:
        return True
    if not site.is_ours(api):
        return True
    if site.healthy(api):
        raise InputError(
            f"{api}: another home's server answers there; set PREFECT_SERVER_API_PORT to a free port, or use that "
            "server with --only worker"
        )
    return False


def show(facts: dict[str, Any], console: "Console") -> None:
    for line in facts["said"]:
        console.print(line, highlight=False, markup=False)
    started = " and ".join(facts["started"]) or "nothing: all of it runs"
    console.print(f"started: {started}", highlight=False)
    console.print(f"UI: {facts['ui']}   logs: {facts['logs']}", highlight=False, soft_wrap=True)
    if not facts["prefect"]:
        said = f"for Prefect's own command line: export PREFECT_API_URL={facts['url']}"
        console.print(said, highlight=False, soft_wrap=True)
