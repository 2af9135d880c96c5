"""Headless Firefox over WebDriver BiDi: what `tests.helpers.browser.Page` can, as far as a detector needs it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection

from tests.helpers.browser import connected, wait_for

FIREFOX = next((path for name in ("firefox", "firefox-esr") if (path := shutil.which(name))), None)


class FirefoxPage:
    """One tab. complaints: console errors and uncaught exceptions."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._last = socket, 0
        self.complaints: list[str] = []
        self.version = self.call("session.new", capabilities={})["capabilities"]["browserVersion"]
        self.call("session.subscribe", events=["log.entryAdded"])
        self._tab = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method: str, **parameters: Any) -> Any:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=600))
            if message.get("id") == self._last:
                if message["type"] == "error":
                    raise AssertionError(f"{method}: {message['message']}")
                return message["result"]
            if message.get("method") == "log.entryAdded" and message["params"]["level"] == "error":
                self.complaints.append(message["params"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression; a promise is awaited."""
        text = f"(async () => JSON.stringify(await ({script})))()"
        answer = self.call("script.evaluate", expression=text, awaitPromise=True, target={"context": self._tab})
        if answer["type"] == "exception":
            raise AssertionError(f"{script[:300]}: {answer['exceptionDetails']['text']}")
        return json.loads(answer["result"].get("value", "null"))

    def wait(self, script: str, seconds: float = 600.0) -> Any:
        """Until the expression is true; its value."""
        return wait_for(self.run, script, seconds)

    def open(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self._tab, url=url, wait="complete")


@contextmanager
def firefox() -> Iterator[FirefoxPage]:
    """A fresh Firefox with one empty tab."""
    assert FIREFOX is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log"
        words = [FIREFOX, "--headless", "--remote-debugging-port=0", "--profile", folder, "about:blank"]
        with log.open("wb") as said, connected(words, lambda: _address(log), said) as socket:
            yield FirefoxPage(socket)


def _address(log: Path) -> str | None:
    found = re.search(r"WebDriver BiDi listening on (ws://\S+)", log.read_text(errors="replace"))
    return None if found is None else f"{found.group(1)}/session"
