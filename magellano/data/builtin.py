"""Data sets made on the spot from what every CPython ships, so that the demo needs no download.

python-topics      English prose: the language reference's help topics (pydoc_data.topics), one document per section
python-docstrings  real pairs: a function's signature -> the first line of its docstring, from the standard library's
                   sources, which are parsed and never imported or run

Both are the same on every run of one Python; another Python version has slightly different texts.
"""

import ast
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from magellano.errors import InputError

# Sources of 3.11 to 3.13 with many documented functions for their size (parsing takes most of the time).
_MODULES = """
_pydecimal asyncio/base_events asyncio/events asyncio/locks asyncio/protocols asyncio/queues asyncio/streams
asyncio/tasks asyncio/transports base64 bdb bz2 calendar cmd code codecs collections/__init__ concurrent/futures/_base
configparser contextlib difflib dis email/_policybase email/message email/parser enum fileinput fractions ftplib
functools gzip heapq hmac http/client http/cookiejar http/cookies http/server imaplib importlib/_bootstrap
importlib/_bootstrap_external importlib/abc importlib/metadata/__init__ inspect ipaddress json/__init__ json/encoder
linecache logging/__init__ logging/handlers lzma mailbox mimetypes multiprocessing/context multiprocessing/managers
multiprocessing/pool numbers operator pickletools platform poplib queue random sched secrets selectors shlex shutil
site smtplib socket socketserver ssl stat statistics symtable tarfile tempfile textwrap threading timeit trace
traceback turtle typing unittest/case unittest/loader unittest/result urllib/parse uuid warnings weakref
wsgiref/handlers wsgiref/headers wsgiref/util xml/etree/ElementTree xml/sax/handler xml/sax/saxutils xml/sax/xmlreader
xmlrpc/server
"""
FEWEST_PAIRS = 2000  # fewer: the library's sources are not there
_UNDERLINED = re.compile(r"^(?P<title>\S.*)\n(?P<line>[*=~\-^\"])(?P=line){2,}$", re.MULTILINE)
_RULE = re.compile(r"={3,}")  # a line across the page
_Row = dict[str, str]


def write(name: str, folder: Path) -> Path:
    """Write the set `name` into `folder` as JSON Lines; returns the file. InputError for a name that is no set."""
    if name not in _SETS:
        raise InputError(
            f"builtin:{name}: no such built-in data set; there are {', '.join(f'builtin:{n}' for n in _SETS)}"
        )
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _SETS[name]()), encoding="utf-8")
    return path


@cache
def topics() -> tuple[_Row, ...]:
    """{text}: each section of each help topic once (topics repeat one another's sections), title first."""
    from pydoc_data.topics import topics as pages

    documents = dict.fromkeys(text for _, page in sorted(pages.items()) for text in _sections(page))
    return tuple({"text": text} for text in documents)


def _sections(page: str) -> Iterator[str]:
    """Cut a page before each underlined title; a title without text under it makes no document."""
    starts = list(_UNDERLINED.finditer(page))
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        body = page[start.end() : following.start() if following else len(page)]
        lines = (line.rstrip() for line in body.splitlines() if not _RULE.fullmatch(line))
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
        if body:
            yield f"{start['title'].strip()}\n\n{body}\n"


@cache
def docstrings() -> tuple[_Row, ...]:
    """{prompt, completion}: `def Fraction.limit_denominator(self, max_denominator=1000000):` and what it is said to do.

    Raises InputError where this Python ships without its library's sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str], None] = {}
    for module in _MODULES.split():
        path = library / f"{module}.py"
        if path.is_file():
            found.update(dict.fromkeys(_pairs(ast.parse(path.read_bytes()))))
    if len(found) < FEWEST_PAIRS:
        raise InputError(
            f"builtin:python-docstrings: only {len(found)} functions found in {library}; "
            "use a Python that has its standard library as source files"
        )
    return tuple({"prompt": prompt, "completion": completion} for prompt, completion in found)


def _pairs(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Functions and methods in the order of the source; those inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _pairs(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            says = (ast.get_docstring(child) or "").partition("\n")[0].strip()
            if len(says.split()) >= 3 and "->" not in says:  # else it names the function or repeats the signature
                kind = "async def" if isinstance(child, ast.AsyncFunctionDef) else "def"
                yield f'{kind} {prefix}{child.name}({ast.unparse(child.args)}):\n    """', says
        elif isinstance(child, ast.If | ast.Try):
            yield from _pairs(child, prefix)


_SETS: dict[str, Callable[[], tuple[_Row, ...]]] = {"python-topics": topics, "python-docstrings": docstrings}
