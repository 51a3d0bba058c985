"""What the test suite holds already, counted here: malformed data, Hypothesis, hostile model files, fuzzed headers."""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from tests.torture.cli import ROOT
from tests.torture.outcome import Row, Share

HEADERS = 100_000
HYPOTHESIS = 300  # examples of the two properties in tests/data/test_hostile.py, as its settings say
SUITES = {
    "malformed data files": ["tests/data/test_hostile.py", "-k", "hostile_file"],
    "random bytes and records (Hypothesis)": ["tests/data/test_hostile.py", "-k", "random_bytes or random_records"],
    "hostile model files": ["tests/test_tensors.py", "tests/test_loader.py", "tests/test_durable.py"],
    "fuzzed safetensors headers": ["tests/test_headers_fuzz.py", "-s"],
    "faults of the training's child process": ["tests/test_isolation.py"],
    "nothing is pickled": ["tests/test_no_pickle.py"],
}


def part(share: Share) -> Iterator[Row]:
    for fault, arguments in SUITES.items():
        if all((ROOT / a).exists() for a in arguments if a.endswith(".py")):
            yield suite(fault, arguments, share)


def suite(fault: str, arguments: list[str], share: Share) -> Row:
    """A module of the suite: its cases are the tries, or the examples and headers that they go through."""
    row = Row(fault, f"`pytest {' '.join(a for a in arguments if a.endswith('.py'))}`")
    environment = os.environ | {"MAGELLANO_FUZZ_HEADERS": str(share.of(HEADERS, 2000))}
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else iter(())
        for case in cases:
            skipped = case.find("skipped")
            row.tries += skipped is None
            for bad in (*case.iter("failure"), *case.iter("error")):
                row.check(False, f"{case.get('name')}: {bad.get('message', '')[:500]}")
    row.check(done.returncode == 0, f"pytest ended with {done.returncode}: {done.stdout[-1000:]}")
    row.note = f"{row.tries} cases"
    if "Hypothesis" in fault:
        row.note, row.tries = f"{row.tries} properties", HYPOTHESIS
    if found := re.search(r"(\d+) headers: (.*)", done.stdout):
        row.tries, row.note = int(found[1]), found[2]
    return row
