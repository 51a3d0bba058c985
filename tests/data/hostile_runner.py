"""Runs each case of test_hostile.py through the tokenize stage in a fork of its own and says what it took.

Called with a JSON list of [name, DataConfig fields] on standard input; prints one JSON object a line.
"""

import json
import os
import resource
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pandas  # noqa: F401  imported here once, so that no fork pays for it
import pandera.pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401

from magellano.errors import InputError
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from magellano.tokenizer import Tokenizer

VOCAB = 300


def case(fields: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            books = tokenize.run(Path(folder), DataConfig(**fields), VOCAB, silent)["accounting"]
        except InputError as e:
            return {"refused": str(e)}
        except BaseException:
            return {"crashed": traceback.format_exc()}
        rejects = (Path(folder) / tokenize.REJECTS).read_text(encoding="utf-8").splitlines()
        return {"books": books, "rejects": [json.loads(line) for line in rejects[:100]]}


def main() -> None:
    Tokenizer(VOCAB).encode("tables")
    unit = 1 if sys.platform == "darwin" else 1024
    for name, fields in json.load(sys.stdin):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_CPU, (20, 20))  # what runs away ends, and has failed
            with os.fdopen(writer, "w") as out:
                json.dump(case(fields), out)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = answer.read()
        _, status, used = os.wait4(child, 0)
        outcome = json.loads(text) if text else {"crashed": f"ended with status {status}"}
        cost = {"seconds": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * unit}
        print(json.dumps({"name": name, **outcome, **cost}), flush=True)


if __name__ == "__main__":
    main()
