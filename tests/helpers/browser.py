"""Headless Chromium over its debugging protocol: the few commands that the test of the page needs."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)


def wait_for(run: Callable[[str], Any], script: str, seconds: float) -> Any:
    """Until the expression is true; its value. run: evaluates one in a page."""
    end = time.monotonic() + seconds
    while not (value := run(script)):
        assert time.monotonic() < end, f"never true: {script}\n{run('document.body.innerText')}"
        time.sleep(0.03)
    return value


class Page:
    """One tab. `complaints` collects console errors, uncaught exceptions and violations of the content policy."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.requested: list[str] = []

    def call(self, method: str, **parameters: Any) -> Any:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=600))
            if message.get("id") == self._last:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        content = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(content["exceptionDetails"].get("exception", {}).get("description")))
        elif event.get("method") == "Log.entryAdded" and content["entry"]["level"] == "error":
            if content["entry"]["source"] != "network":  # a refused picture is an answer, not a mistake of the page
                self.complaints.append(content["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            self.requested.append(content["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 600.0) -> Any:
        """Until the expression is true; its value."""
        return wait_for(self.run, script, seconds)

    def open(self, url: str, width: int = 1280, height: int = 800, *, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def choose(self, selector: str, file: Path) -> None:
        """Act as a user who picks `file` in the file dialogue."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def press(self, key: str) -> None:
        codes = {
            "Tab": 9,
            "Enter": 13,
            " ": 32,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "ArrowLeft": 37,
            "End": 35,
            "Home": 36,
        }
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {"key": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(*flags: str) -> Iterator[Page]:
    """A fresh Chromium with one empty tab. flags: of its command line, besides those that every test needs."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [CHROMIUM, *_FLAGS, *flags, f"--user-data-dir={profile}", "about:blank"]
        with connected(words, lambda: _tab(Path(profile) / "DevToolsActivePort")) as socket:
            yield Page(socket)


@contextmanager
def connected(
    words: list[str], address: Callable[[], str | None], stderr: Any = subprocess.DEVNULL
) -> Iterator[ClientConnection]:
    """Start a browser and talk to it, once `address` knows where."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        end = time.monotonic() + 600
        while (found := address()) is None:
            assert time.monotonic() < end and process.poll() is None, f"{words[0]} did not start"
            time.sleep(0.05)
        with connect(found, max_size=2**28) as socket:
            yield socket
    finally:
        process.kill()
        process.wait()


def _tab(file: Path) -> str | None:
    if not file.is_file() or not (lines := file.read_text().split()):
        return None
    with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=600) as answer:
        tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
    return str(tabs[0]["webSocketDebuggerUrl"]) if tabs else None
