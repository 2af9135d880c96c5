"""An S3 server on this machine (moto), with faults: 503 for a share of the requests, bodies that are cut, slow answers.

with s3_server(monkeypatch) as server:
    server.put("bucket/name", b"bytes")
    server.faults.share = 0.05
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Faults:
    """What goes wrong. share: of the requests that are answered 503 (`begin`). cut: ends of paths whose body is
    cut in the middle once. slow_s: before each answer. refused: ends of paths that nobody may read."""

    share: float = 0.0
    cut: set[str] = field(default_factory=set)
    slow_s: float = 0.0
    refused: tuple[str, ...] = ()
    injected: int = 0
    """Answers that were 503."""
    were_cut: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of each."""

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(0), threading.Lock()

    def begin(self, share: float, seed: int = 0) -> None:
        """From here on so many requests are answered 503, the same ones for the same seed."""
        self.share, self.injected, self._random = share, 0, random.Random(seed)

    def asked(self, text: str) -> bool:
        """Whether this request is answered 503."""
        with self._lock:
            self.requests.append(text)
            unlucky = self._random.random() < self.share
            self.injected += unlucky
            return unlucky

    def cuts(self, path: str) -> bool:
        with self._lock:
            found = next((end for end in self.cut if path.endswith(end)), None)
            if found is not None:
                self.cut.discard(found)
                self.were_cut.append(path)
            return found is not None


@dataclass
class S3Server:
    address: str
    faults: Faults

    def put(self, name: str, content: bytes | Path) -> None:
        """Store `bucket/key`; the bucket is made."""
        self._client.pipe_file(name, content if isinstance(content, bytes) else content.read_bytes())

    def put_folder(self, folder: Path, name: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{name}/{file.relative_to(folder).as_posix()}", file)

    def get(self, name: str) -> bytes:
        return self._client.cat_file(name)

    def names(self, name: str) -> list[str]:
        return sorted(self._client.find(name))

    def make_bucket(self, name: str) -> None:
        self._client.mkdir(name)

    def remove(self, name: str) -> None:
        """Remove everything below `bucket/key`, if there is anything."""
        if self.names(name):
            self._client.rm(name, recursive=True)

    @cached_property
    def _client(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.address, key="test", secret="test", skip_instance_cache=True, use_listings_cache=False
        )


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[S3Server]:
    """Serve while it is open; the environment of this process and its children leads to it, with an empty cache."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    faults = Faults()
    app = _Faulty(server_module.DomainDispatcherApplication(server_module.create_backend_app), faults)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "COMPRESS_STORAGE_CACHE": str(cache),
    }.items():
        monkeypatch.setenv(key, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # that of an earlier server
    try:
        yield S3Server(f"http://127.0.0.1:{server.server_port}", faults)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        _forget_all()


def _forget_all() -> None:
    from moto.backends import get_backend

    get_backend("s3").reset()


class _Faulty:
    """Puts faults before a WSGI application."""

    def __init__(self, app: Any, faults: Faults) -> None:
        self._app, self._faults = app, faults

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        faults = self._faults
        if faults.slow_s:
            time.sleep(faults.slow_s)
        status = "403 Forbidden" if path.endswith(faults.refused or ("\0",)) else None
        if faults.asked(f"{method} {path}"):
            status = "503 Service Unavailable"
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(status, [("Content-Length", "0"), ("Connection", "close")])
            return [b""]
        answer = self._app(environ, start)
        if method == "GET" and faults.cuts(path):
            return _half(answer)
        return answer


def _half(answer: Iterable[bytes]) -> Iterator[bytes]:
    body = b"".join(answer)
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("cut")
