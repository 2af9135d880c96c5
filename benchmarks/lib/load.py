"""Load on an HTTP server from one process: open loop (arrivals do not wait for answers) and closed loop.

A latency counts from the moment at which a request was due, not from when the generator got round to it: a server
that stalls is charged with all requests that would have come meanwhile. Plain asyncio streams, because the generator
shares the machine with the server: a request costs it a tenth of a millisecond.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOST, REFUSED = -1, -2
"""Status of a request that was sent and not, or not wholly, answered; and of one that reached no server. A kept
connection that closes before a byte of the answer is no loss, as in any client of HTTP: the request is sent again, and
counted."""


@dataclass(frozen=True)
class Shot:
    """One request. `index` is that of its body; times are seconds on one clock."""

    index: int
    due: float
    done: float
    status: int
    body: bytes
    retry_after_s: int | None = None
    retries: int = 0
    """Kept connections that closed before a byte of an answer."""

    @property
    def latency_s(self) -> float:
        return self.done - self.due


@dataclass(frozen=True)
class Target:
    """Target of requests. `head` is everything before `Content-Length`."""

    host: str
    port: int
    path: str = "/v1/detect"
    headers: tuple[str, ...] = ("Content-Type: application/octet-stream",)

    def request(self, body: bytes) -> bytes:
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}", *self.headers]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def open_loop(
    target: Target, bodies: Sequence[bytes], *, rate: float, seconds: float, seed: int = 0
) -> list[Shot]:
    """Poisson arrivals at `rate` a second; the bodies in turn. Ends when the last request is answered."""
    gun = _Gun(target, bodies)
    arrivals = random.Random(seed)
    start = time.monotonic()
    due = start
    tasks: list[asyncio.Task[Shot]] = []
    while True:
        due += arrivals.expovariate(rate)
        if due > start + seconds:
            break
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(gun.shoot(len(tasks) % len(bodies), due)))
    shots = await asyncio.gather(*tasks)
    gun.close()
    return list(shots)


async def closed_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    clients: int,
    count: int | None = None,
    seconds: float | None = None,
    on_shot: Callable[[Shot], None] | None = None,
    until: Callable[[Shot], bool] | None = None,
) -> list[Shot]:
    """`clients` that each send the next request when they have an answer, until `count` were sent, `seconds` are over
    or `until` is true of an answer. on_shot: gets every answer instead of the returned list."""
    gun = _Gun(target, bodies)
    shots: list[Shot] = []
    end = math.inf if seconds is None else time.monotonic() + seconds
    sent, over = 0, False

    async def client() -> None:
        nonlocal sent, over
        while (count is None or sent < count) and time.monotonic() < end and not over:
            index = sent
            sent += 1
            shot = await gun.shoot(index % len(bodies), time.monotonic())
            if on_shot is None:
                shots.append(shot)
            else:
                on_shot(shot)
            over |= until is not None and until(shot)
            if shot.status < 0:
                await asyncio.sleep(0.01)

    await asyncio.gather(*(client() for _ in range(clients)))
    gun.close()
    return shots


def percentiles(seconds: Sequence[float], which: Sequence[float] = (50, 90, 99, 99.9)) -> dict[str, float]:
    """Milliseconds, nearest rank; NaN without values."""
    ordered = sorted(seconds)
    return {
        f"p{share:g}": 1e3 * ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else math.nan
        for share in which
    }


async def get(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body of one GET on a connection of its own."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {target.host}\r\nConnection: close\r\n\r\n".encode())
    status, body, _, _ = await _answer(reader)
    writer.close()
    return status, body


# ----------------------------------------------------------------------------------------------------


class _Reader(asyncio.StreamReader):
    """Counts what arrives: a reader that fails keeps it to itself."""

    received = 0

    def feed_data(self, data: bytes) -> None:
        self.received += len(data)
        super().feed_data(data)


_Connection = tuple[_Reader, asyncio.StreamWriter]


async def _connect(target: Target) -> _Connection:
    loop = asyncio.get_running_loop()
    reader = _Reader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, target.host, target.port)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class _Gun:
    """Connections to one target, kept and used again, the last one first."""

    def __init__(self, target: Target, bodies: Sequence[bytes]) -> None:
        self._target = target
        self._requests = [target.request(body) for body in bodies]
        self._idle: list[_Connection] = []

    async def shoot(self, index: int, due: float) -> Shot:
        retries = 0
        while self._idle:
            connection = self._idle.pop()
            shot = await self._exchange(connection, index, due, retries)
            if shot.status != LOST or connection[0].received:
                return shot
            retries += 1
        try:
            connection = await _connect(self._target)
        except OSError:
            return Shot(index, due, time.monotonic(), REFUSED, b"", retries=retries)
        return await self._exchange(connection, index, due, retries)

    async def _exchange(self, connection: _Connection, index: int, due: float, retries: int) -> Shot:
        reader, writer = connection
        reader.received = 0
        try:
            writer.write(self._requests[index])
            status, body, retry_after_s, keep = await _answer(reader)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return Shot(index, due, time.monotonic(), LOST, b"", retries=retries)
        if keep:
            self._idle.append(connection)
        else:
            writer.close()
        return Shot(index, due, time.monotonic(), status, body, retry_after_s, retries)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes, int | None, bool]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
    body = await reader.readexactly(int(fields.get("content-length", "0")))
    retry = fields.get("retry-after")
    return int(head[0].split(" ")[1]), body, None if retry is None else int(retry), fields.get("connection") != "close"
