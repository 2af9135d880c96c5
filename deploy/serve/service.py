"""State that the routes of the server work with, and the steps that those for pictures and for tensors share.

A request that detects goes: body (bounded, before anything is taken) → place in the model's queue, or 429 → decoding in
the pool → batcher → answer. When its client goes away, it gives back its place at whatever point it is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import Request, Response

from deploy.serve.answers import ErrorAnswer
from deploy.serve.batching import Row, Ticket
from deploy.serve.bodies import Bodies, ClientGoneError
from deploy.serve.metrics import Metrics
from deploy.serve.models import Models, Served
from deploy.serve.settings import OverloadedError, RefusalError, Settings


@dataclass
class Service:
    """State of a server, for its routes. `draining` is set when the server is asked to end."""

    settings: Settings
    models: Models
    metrics: Metrics
    bodies: Bodies = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)
    draining: bool = False

    def __post_init__(self) -> None:
        limits = self.settings
        self.bodies = Bodies(
            max_bytes=limits.max_bytes,
            max_held_bytes=max(limits.max_held_bytes, 2 * limits.max_bytes),  # the largest, with its parts, must fit
            timeout_s=limits.body_timeout_s,
        )
        self.pool = ThreadPoolExecutor(limits.decode_workers, thread_name_prefix="decode")
        self.metrics.watch_bodies(lambda: self.bodies.held_bytes)

    @property
    def ready(self) -> bool:
        return self.models.ready and not self.draining

    def shed(self, path: str, query: bytes) -> RefusalError | None:
        """The refusal of a request that would certainly be refused, before its body is read and at a fraction of the
        cost: under overload this is what most requests get."""
        if path in ("/v1/detect", "/v1/vision/detection") and b"model" not in query:
            name = self.models.names[0]
        elif path.startswith("/v2/models/") and path.endswith("/infer"):
            name = path.split("/")[3]
        else:
            return None
        batcher = self.models.batcher(name)
        refusal = None if batcher is None else batcher.refusal(1, self.settings.deadline_ms / 1e3)
        if refusal is not None:
            self.metrics.rejected.labels(name, refusal.reason).inc()
            self.metrics.statistics[name].fail.add(0.0)
        return refusal

    async def in_pool(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)


def admit(service: Service, served: Served, images: int, deadline_s: float | None) -> Ticket:
    """Raises OverloadedError."""
    limit = service.settings.deadline_ms / 1e3
    return served.batcher.admit(images, limit if deadline_s is None else min(limit, deadline_s))


@asynccontextmanager
async def counted(service: Service, name: str) -> AsyncIterator[None]:
    """Count what goes wrong with a request, and overload of any reason: while the body arrives, at the door or in the
    queue."""
    start = time.monotonic()
    try:
        yield
    except Exception as error:
        service.metrics.statistics[name].fail.add(time.monotonic() - start)
        if isinstance(error, OverloadedError):
            service.metrics.rejected.labels(name, error.reason).inc()
        raise


async def run(service: Service, served: Served, ticket: Ticket, canvases: list[np.ndarray]) -> list[Row]:
    rows = await ticket.detect(canvases)
    service.metrics.images.labels(served.name).inc(len(rows))
    return rows


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client closes its connection: ClientGoneError."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})  # its ticket is given back only after it has ended


def timing_ms(
    service: Service, request: Request, served: Served, rows: list[Row], received: float, more: dict[str, float]
) -> dict[str, float]:
    """Milliseconds of each stage until now, of the slowest image where there are several; also for the metrics.
    `more`: seconds of stages that not every request has."""
    start = request.state.start
    seconds = {
        "receive": received - start,
        **more,
        "queue": max(row.queue_s for row in rows),
        "inference": max(row.inference_s for row in rows),
        "total": time.monotonic() - start,
    }
    for stage, value in seconds.items():
        service.metrics.stages.labels(served.name, stage).observe(value)
    service.metrics.statistics[served.name].answered(len(rows), seconds)
    return {stage: round(1e3 * value, 3) for stage, value in seconds.items()}


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        400: "Malformed request",
        401: "The token is missing or wrong",
        403: "Not allowed here",
        404: "No such model",
        408: "The body came too slowly",
        409: "The model changed meanwhile",
        413: "Too many bytes, pixels or pictures",
        415: "Not a format that is taken",
        422: "A broken picture, or a parameter out of range",
        429: "Overloaded; Retry-After says when to come back",
        503: "Not ready; Retry-After says when to come back",
    }
    return {status: {"model": ErrorAnswer, "description": texts[status]} for status in statuses}


def json_answer(content: Any, status: int = 200) -> Response:
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return Response(body, status, media_type="application/json")
