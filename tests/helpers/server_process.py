"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    log_file: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def connect(self, timeout: float = 600.0) -> socket.socket:
        return socket.create_connection(self.address, timeout=timeout)

    def log(self) -> list[dict[str, Any]]:
        """Every line so far; all of them must be JSON."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 600.0) -> int:
        """The exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)


@contextmanager
def server(
    *arguments: str | Path,
    environment: dict[str, str] | None = None,
    ready: bool = True,
    limits: dict[str, Any] | None = None,
    folder: Path = ROOT,
) -> Iterator[Server]:
    """`compress serve ARGUMENTS` in `folder`, on a free port, ready; killed at the end if it still runs.

    limits: the one argument is a file, and it is served with these `Settings`, of which not all are options."""
    command = [sys.executable, "-m", "compress", "serve", "--port", "0", *map(str, arguments)]
    if limits is not None:
        (file,) = arguments
        command = [sys.executable, "-c", _WITH_LIMITS, str(file), json.dumps(limits)]
    with tempfile.TemporaryDirectory() as logs:
        log_file = Path(logs) / "log"
        with log_file.open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        try:
            yield Server(_url(process, log_file, ready), process, log_file)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


_WITH_LIMITS = """
import json, sys
from functools import partial
from pathlib import Path
from deploy.runtimes.open import open_runner
from deploy.serve.server import serve
from deploy.serve.settings import Settings
path = Path(sys.argv[1])
settings = Settings(**json.loads(sys.argv[2]))
serve({path.stem: path}, partial(open_runner, threads=1), settings, port=0, announce=partial(print, flush=True))
"""


def _url(process: subprocess.Popen[str], log_file: Path, ready: bool) -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if match := re.match(r"ready: (\S+)" if ready else r"listening on (http://[^ ,]+)", line):
                return match[1]
    finally:
        watchdog.cancel()
    raise AssertionError(f"the server ended with {process.wait()}:\n{log_file.read_text()}")
