"""No network: the pipeline in an empty network namespace, and under strace in a normal one, where every address that a
process of it connects or sends to must be loopback. Controls that do open a connection must be caught.
"""

import ipaddress
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.torture import cli, rig
from tests.torture.outcome import Row, Share

TRACED = "trace=connect,sendto,sendmsg,sendmmsg,bind"
CALL = re.compile(r"^\d+\s+(connect|sendto|sendmsg|sendmmsg|bind)\((.*)")
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"|sin6_addr="?([0-9a-f:.]+)')
PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
# 192.0.2.0/24 and 2001:db8::/32 are for documentation: nobody answers. A datagram to port 53 is what asking a DNS is.
CONTROLS = {
    "a TCP connection": "s = socket.socket(); s.setblocking(False); s.connect_ex(('192.0.2.1', 443))",
    "a UDP datagram": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "a DNS question": "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.53', 53))",
    "an IPv6 connection": "s = socket.socket(socket.AF_INET6); s.setblocking(0); s.connect_ex(('2001:db8::1', 443))",
    "a child's connection": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import socket; "
    's = socket.socket(); s.setblocking(False); s.connect_ex(("192.0.2.7", 80))\'])',
    "a thread's connection": "import threading; t = threading.Thread(target=lambda: "
    "socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.8', 1))); t.start(); t.join()",
}
LOCAL = "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); socket.socketpair()"
SERVER_TEST = "tests/flows/test_server.py"


def part(share: Share) -> Iterator[Row]:
    yield controls()
    yield from pipeline()


def server(share: Share) -> Iterator[Row]:
    """With a real Prefect server, worker and deployments: their test, as it is, in both ways."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SERVER_TEST]
    with tempfile.TemporaryDirectory() as name:
        yield from both("server, worker, deployment runs", f"`pytest {SERVER_TEST}`", [command], Path(name), 900)


@dataclass
class Seen:
    """What a traced command did: its status, the addresses beyond loopback, the number of loopback ones."""

    status: int
    said: str
    outside: list[str]
    loopback: int


def traced(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> Seen:
    log = folder / "strace.log"
    strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-s", "0", "-e", TRACED, "-e", "signal=none", "-o", str(log)]
    status, said = _run([*strace, *command], environment, seconds)
    outside, loopback = [], 0
    with log.open(errors="replace") as lines:
        for line in lines:
            where = beyond(line)
            outside += [f"{where}: {line.strip()[:200]}"] if where else []
            loopback += where == "" and "AF_INET" in line
    return Seen(status, said, outside, loopback)


def beyond(line: str) -> str:
    """The address beyond loopback that a line of strace's output names, or nothing. One that cannot be read counts."""
    match = CALL.match(line)
    if not match or "AF_INET" not in match[2] or (match[1] == "bind"):
        return ""
    found = [a or b or c for a, b, c in ADDRESS.findall(match[2])]
    port = PORT.search(match[2])
    if not found:
        return "unreadable"
    for text in found:
        address = ipaddress.ip_address(text)
        mapped = getattr(address, "ipv4_mapped", None)
        if not (mapped or address).is_loopback or (port and port[1] == "53"):
            return f"{text} port {port[1] if port else '?'}"
    return ""


def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=cli.ROOT, env=environment, stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=seconds,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def controls() -> Row:
    """Each control must be caught, and what stays on loopback must not."""
    row = Row("control: a connection beyond loopback is caught", "a script under strace")
    if not shutil.which("strace"):
        row.skipped = "strace is not there"
        return row
    with tempfile.TemporaryDirectory() as name:
        for what, script in CONTROLS.items():
            seen = traced([sys.executable, "-c", f"import socket; {script}"], Path(name), dict(os.environ), 60)
            row.tries += 1
            row.check(seen.outside, f"{what}: not caught (status {seen.status}, {seen.said[:300]})")
        seen = traced([sys.executable, "-c", f"import socket; {LOCAL}"], Path(name), dict(os.environ), 60)
        row.tries += 1
        row.check(seen.status == 0 and not seen.outside and seen.loopback, f"loopback alone: {seen}")
    row.note = ", ".join(CONTROLS)
    return row


def pipeline() -> Iterator[Row]:
    """`magellano train` from nothing, and once more with everything there."""
    with tempfile.TemporaryDirectory() as name:
        profile = rig.write_profile(Path(name))
        yield from both("the whole pipeline, twice", cli.LEVEL, [cli.command(profile)] * 2, Path(name), 300)


def both(what: str, level: str, commands: list[list[str]], folder: Path, seconds: float) -> Iterator[Row]:
    """In a namespace with nothing but loopback; then traced in a normal one."""
    row = Row(f"no network at all: {what}", f"{level}, in a network namespace")
    probe = "import os, sys; sys.exit(sorted(os.listdir('/sys/class/net')) != ['lo'])"
    setup = 'mount -t sysfs sysfs /sys && ip link set lo up && exec "$@"'
    inside = ["unshare", "-n", "--mount", "sh", "-c", setup, "-"]
    tools = shutil.which("unshare") and shutil.which("ip")
    if not tools or subprocess.run([*inside, "true"], capture_output=True).returncode:
        row.skipped = "may not make a network namespace"
    else:
        alone = _run([*inside, sys.executable, "-c", probe], dict(os.environ), 60)[0] == 0
        row.check(alone, "there is more than loopback in the namespace")
        for command in commands:
            row.tries += 1
            status, said = _run([*inside, *command], cli.environment(folder / "alone"), seconds)
            row.check(status == 0, f"ended with {status}: {said[-1500:]}")
    yield row
    row = Row(f"nothing beyond loopback, no DNS: {what}", f"{level}, under strace")
    if not shutil.which("strace"):
        row.skipped = "strace is not there"
        yield row
        return
    loopback = 0
    for command in commands:
        row.tries += 1
        seen = traced(command, folder, cli.environment(folder / "traced"), seconds)
        row.check(seen.status == 0, f"ended with {seen.status}: {seen.said[-1500:]}")
        row.check(seen.loopback, "not even a loopback address was seen: the trace is blind")
        row.wrong += sorted(set(seen.outside))
        loopback += seen.loopback
    row.note = f"{loopback} calls to loopback addresses"
    yield row
