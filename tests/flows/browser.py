"""Headless Chromium over its DevTools protocol: no driver, no package but `websockets`, which Prefect brings."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--remote-debugging-port=0", "--window-size=1360,900",
)  # fmt: skip
FIND = """
(function () {
  const wanted = WANTED, seen = e => e.getClientRects().length > 0;
  const fits = e => (e.innerText || e.value || e.ariaLabel || '').trim() === wanted;
  const all = [...document.querySelectorAll(SELECTOR)].filter(e => seen(e) && (wanted === null || fits(e)));
  return all[all.length - 1];
})()
"""


def program() -> str | None:
    """Chromium, if it is here."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One page. `asked` holds the URL of every request that it made or tried to make."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.refused: list[str] = []
        profile = folder / "chromium"
        path = program()
        assert path
        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 120
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.2)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=60) as answer:
            page = next(t for t in json.load(answer) if t["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None, open_timeout=60, ping_interval=None)
        self._number = 0
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that come meanwhile are taken down."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            case "Network.loadingFailed" if message["params"].get("blockedReason"):
                self.refused.append(message["params"]["blockedReason"])
            case "Log.entryAdded" if "Content Security Policy" in message["params"]["entry"]["text"]:
                self.refused.append(message["params"]["entry"]["text"])

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{script}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def text(self) -> str:
        """What the page shows."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait(self, what: str, seconds: float = 90) -> str:
        """Until the page shows `what`; the page's text."""
        deadline = time.monotonic() + seconds
        while what not in (text := self.text()):
            assert time.monotonic() < deadline, f"{what!r} is not on the page:\n{text[:3000]}"
            time.sleep(0.5)
        return text

    def click(self, wanted: str | None, selector: str = "body *", seconds: float = 60) -> None:
        """Click the last visible element of that text as a mouse does."""
        find = FIND.replace("WANTED", json.dumps(wanted)).replace("SELECTOR", json.dumps(selector))
        deadline = time.monotonic() + seconds
        script = f"""(e => {{ if (!e) return null; e.scrollIntoView({{block: 'center'}});
            const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})({find})"""
        at = before = None
        while not at or at != before:  # it stands still: a page that still grows would be clicked beside it
            assert time.monotonic() < deadline, f"nothing to click: {wanted!r} {selector}\n{self.text()[:3000]}"
            time.sleep(0.3)
            before, at = at, self.evaluate(script)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **button)

    def focus(self, script: str) -> None:
        """Give the focus to the element that a JavaScript expression finds."""
        assert self.evaluate(f"(e => e ? (e.focus(), true) : false)({script})"), script

    def type(self, text: str) -> None:
        """Into what has the focus, in place of all that stands there."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="a", code="KeyA", modifiers=2, commands=["selectAll"])
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Save what is seen as a PNG of 256 colours."""
        from io import BytesIO

        from PIL import Image

        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        Image.open(BytesIO(data)).convert("RGB").quantize(64).save(path, optimize=True)
