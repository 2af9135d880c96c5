"""The models of a server: opened, warmed up, and replaced while they serve."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.runtimes.base import Runner
from deploy.serve.batching import Batcher, Call
from deploy.serve.metrics import Metrics
from deploy.serve.settings import RefusalError, Settings

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
log = logging.getLogger("compress.serve")


@dataclass(frozen=True)
class Served:
    """A model that takes requests."""

    name: str
    runner: Runner
    batcher: Batcher
    warm_up_s: float

    @property
    def card(self) -> ModelCard:
        return self.runner.card


class Models:
    """Opens all files at once. Raises UserError for a file that cannot be opened, or a name that is no name.

    open_runner: path → a runner; called again, in another thread, when a model is loaded again.
    """

    def __init__(
        self, files: Mapping[str, Path], open_runner: Callable[[Path], Runner], settings: Settings, metrics: Metrics
    ) -> None:
        for name in files:
            if not NAME.fullmatch(name):
                raise UserError(f"'{name}': not a model name (letters, digits, _ . -): give NAME=FILE")
        self._files, self._open_runner = dict(files), open_runner
        self._settings, self._metrics = settings, metrics
        self._cold: dict[str, Runner] = {name: open_runner(path) for name, path in self._files.items()}
        self._served: dict[str, Served] = {}
        self._loading = asyncio.Lock()
        self._ending = threading.Event()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @property
    def ready(self) -> bool:
        return len(self._served) == len(self._files)

    def is_ready(self, name: str) -> bool:
        """Raises RefusalError 404 for a name that does not exist."""
        self._known(name)
        return name in self._served

    def get(self, name: str | None = None) -> Served:
        """The model, or the first one. Raises RefusalError 404 (no such model) or 503 (not ready)."""
        name = self.names[0] if name is None else name
        self._known(name)
        if name not in self._served:
            raise RefusalError(503, f"model {name} is warming up", retry_after_s=1)
        return self._served[name]

    def batcher(self, name: str) -> Batcher | None:
        """The batcher of a ready model, else None."""
        served = self._served.get(name)
        return None if served is None else served.batcher

    async def warm_up(self) -> None:
        """Make every model ready, one after the other."""
        async with self._loading:
            for name, runner in self._cold.items():
                await self._start(name, runner)
            self._cold.clear()

    async def reload(self, name: str) -> None:
        """Load the model's file again. The old one serves until the new one is warm, and answers what it accepted.

        Raises RefusalError: 404 for a name that does not exist, 400 for a file that cannot be loaded (the old one
        stays).
        """
        self._known(name)
        async with self._loading:
            try:
                runner = await asyncio.to_thread(self._open_runner, self._files[name])
                await self._start(name, runner)
            except Exception as error:
                self._metrics.reloads.labels(name, "failed").inc()
                log.error("reload failed", exc_info=None if isinstance(error, UserError) else error, extra={
                    "model": name, "error": str(error)})  # fmt: skip
                raise RefusalError(400, f"model {name}: its file cannot be loaded; the old one goes on") from error
            self._metrics.reloads.labels(name, "done").inc()

    async def close(self) -> None:
        """Let every batcher finish what it has. A warm-up ends with the batch size that it is at."""
        self._ending.set()
        for served in self._served.values():
            served.batcher.retire()
        for served in self._served.values():
            await asyncio.to_thread(served.batcher.join)

    def _known(self, name: str) -> None:
        if name not in self._files:
            raise RefusalError(404, f"no such model; there are: {', '.join(self._files)}")

    async def _start(self, name: str, runner: Runner) -> None:
        start = time.monotonic()
        seconds_an_image = await asyncio.to_thread(_warm_up, runner, self._settings.max_batch, self._ending)
        warm_up_s = time.monotonic() - start
        batcher = Batcher(
            runner,
            max_batch=self._settings.max_batch,
            max_delay_s=self._settings.max_delay_ms / 1e3,
            max_queue=self._settings.max_queue,
            seconds_an_image=seconds_an_image,
            decoders=self._settings.decode_workers,
            on_call=lambda call: self._observe(name, call),
        )
        old = self._served.get(name)
        self._served[name] = Served(name, runner, batcher, warm_up_s)
        self._metrics.watch_model(name, runner.backend, runner.card.name, lambda: self._served[name].batcher.depth)
        log.info("model ready", extra={"model": name, "backend": runner.backend, "warm_up_s": round(warm_up_s, 3)})
        if old is not None:  # requests that hold a ticket of it are answered by it
            old.batcher.retire()

    def _observe(self, name: str, call: Call) -> None:
        self._metrics.batches.labels(name).observe(call.batch)
        self._metrics.calls.labels(name).observe(call.seconds)
        if call.error is None:
            self._metrics.statistics[name].called(call.batch, call.seconds)
        else:
            self._metrics.failures.labels(name).inc()
            log.error("inference failed", exc_info=call.error, extra={"model": name, "batch": call.batch})


# ----------------------------------------------------------------------------------------------------


def _warm_up(runner: Runner, max_batch: int, ending: threading.Event) -> float:
    """Run every batch size, because each is a new shape to the runtime, until `ending`. Seconds an image in the
    largest."""
    size = (3, *runner.card.input_size)
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    seconds = 0.0
    for batch in range(1, max_batch + 1):
        if ending.is_set():
            break
        images = np.broadcast_to(noise, (batch, *size)).copy()
        start = time.monotonic()
        runner(images)
        seconds = (time.monotonic() - start) / batch
    return seconds
