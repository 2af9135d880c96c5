"""Folders of `--for web` on a server of static files, and what their detector answers in a browser."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deploy.core.errors import UserError
from deploy.runtimes import web_runtime
from tests.helpers.browser import Page
from tests.helpers.firefox import FirefoxPage

DETECT = """(async () => {{
  const {{ decode }} = await import("./decode.js");
  const {{ openDetector }} = await import("./detector.js");
  const about = await (await fetch("./model.json")).json();
  globalThis.detector ??= await openDetector(about, "{backend}", () => {{}});
  const answers = [];
  for (const text of {files}) {{
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const start = performance.now();
    const {{ answer }} = await detector.detect(await decode(new File([bytes], "x")));
    answers.push({{ ...answer, ms: performance.now() - start }});
  }}
  return answers;
}})()"""


def need_runtime() -> None:
    """Skip where ONNX Runtime Web is not in the cache and cannot be fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("npm_config_fetch_retries", "0")
        try:
            web_runtime.runtime_files()
        except UserError as error:
            pytest.skip(f"ONNX Runtime Web is not tried: {error}")


@contextmanager
def serving(root: Path, headers: dict[str, str] | None = None, *, says_gzip: bool = False) -> Iterator[str]:
    """A server of static files that knows nothing of the page; its address. says_gzip: that .gz files are packed."""

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if says_gzip and self.path.endswith(".gz"):
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def answers(page: Page | FirefoxPage, files: Sequence[bytes], backend: str = "wasm") -> list[dict[str, Any]]:
    """What the detector of the open page answers to pictures, each with the milliseconds it took, decoding included."""
    texts = json.dumps([base64.b64encode(file).decode() for file in files])
    found: list[dict[str, Any]] = page.run(DETECT.format(files=texts, backend=backend))
    return found
