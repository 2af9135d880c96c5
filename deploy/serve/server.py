"""Start and end of the serving process: `serve` is `compress serve`.

SIGTERM: /readyz answers 503 and answers close their connections for `drain_s`, so that balancers and clients go
elsewhere; then nothing new is accepted, everything accepted is answered, and the process ends with 0. SIGINT: the
same without the pause. A second signal ends it at once. SIGHUP: every model's file is loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import signal
import socket
import struct
import termios
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.core.errors import UserError
from deploy.runtimes.base import Runner
from deploy.serve.app import create_app
from deploy.serve.metrics import Metrics
from deploy.serve.middleware import Middleware, log_as_json
from deploy.serve.models import Models
from deploy.serve.service import Service
from deploy.serve.settings import RefusalError, Settings

MAX_HEAD_BYTES = 32 * 1024
SLICE_BYTES = 16 * 1024  # of what arrived, handled before looking at it again
FRAMING_BYTES = 16 * 1024  # of a body, beyond twice what is in it
AHEAD_BYTES = 64 * 1024  # of the next request, kept until the answer of this one
log = logging.getLogger("compress.serve")


def serve(
    files: Mapping[str, Path],
    open_runner: Callable[[Path], Runner],
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: str = "info",
    announce: Callable[[str], None] = print,
) -> None:
    """Serve `files` (name → file) until a signal ends it.

    announce: gets one line when the server listens and one when it is ready. Raises UserError when a file cannot be
    opened or the address is taken, before anything listens.
    """
    log_as_json(log_level)
    _allow_connections(settings.max_connections)
    metrics = Metrics()
    models = Models(files, open_runner, settings, metrics)
    service = Service(settings, models, metrics)
    listening = _listen(host, port)
    asyncio.run(_serve(service, listening, announce))


async def _serve(service: Service, listening: socket.socket, announce: Callable[[str], None]) -> None:
    settings = service.settings
    middleware = Middleware(
        create_app(service),
        token=settings.token,
        send_timeout_s=settings.send_timeout_s,
        metrics=service.metrics,
        shed=service.shed,
    )
    server = _Server(
        uvicorn.Config(
            middleware,
            http=guarded_connection(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            timeout_keep_alive=max(1, int(settings.idle_timeout_s)),
            timeout_graceful_shutdown=max(1, int(settings.drain_timeout_s)),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )
    server.first_request_s = settings.first_request_s
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def start(work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def end(pause_s: float) -> None:
        for again in (signal.SIGTERM, signal.SIGINT):  # a second one has the system's effect
            loop.remove_signal_handler(again)
            if os.getpid() == 1:  # which is none on the first process of a container
                loop.add_signal_handler(again, os._exit, 128 + again)
        log.info("draining", extra={"requests": len(server.server_state.tasks)})
        service.draining = middleware.draining = True
        loop.call_later(pause_s, setattr, server, "should_exit", True)

    async def reload_all() -> None:
        for name in service.models.names:
            with contextlib.suppress(RefusalError):  # logged; the old one goes on
                await service.models.reload(name)

    loop.add_signal_handler(signal.SIGTERM, end, settings.drain_s)
    loop.add_signal_handler(signal.SIGINT, end, 0.0)
    loop.add_signal_handler(signal.SIGHUP, lambda: start(reload_all()))

    address, port = listening.getsockname()[:2]
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    warm = start(_warm_up(service, server, announce, url))
    announce(f"listening on {url}, warming up")
    await server.serve(sockets=[listening])
    if warm.done() and not warm.cancelled() and (error := warm.exception()) is not None:
        raise error
    for task in list(tasks):
        task.cancel()
    await service.models.close()
    service.pool.shutdown(cancel_futures=True)


async def _warm_up(service: Service, server: _Server, announce: Callable[[str], None], url: str) -> None:
    try:
        await service.models.warm_up()
    except Exception as error:
        server.should_exit = True  # `_serve` raises it on
        raise UserError(f"warm-up failed: {' '.join(str(error).split())[:300]}") from error
    for name in service.models.names:
        served = service.models.get(name)
        announce(f"{name}: {served.runner.backend}, warm after {served.warm_up_s:.1f} s")
    announce(f"ready: {url}")


class _Server(uvicorn.Server):
    first_request_s = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The handlers are `_serve`'s."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn cuts what waits in the backlog, and connections whose first request it has not read yet. Their
        clients count as connected and cannot know, so here they are answered first."""
        for listening in sockets or []:
            await self._accept_backlog(listening)
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + self.first_request_s
        while any(_before_first_request(c) for c in self.server_state.connections) and loop.time() < until:
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)

    async def _accept_backlog(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)  # from here on only this loop accepts
        listening.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listening.accept()
                await loop.connect_accepted_socket(
                    lambda: self.config.http_protocol_class(  # type: ignore[call-arg]
                        config=self.config, server_state=self.server_state, app_state=self.lifespan.state
                    ),
                    connection,
                )


def _before_first_request(connection: Any) -> bool:
    return isinstance(connection, GuardedConnection) and connection.cycle is None


def _allow_connections(count: int) -> None:
    """Many systems start a process with room for 1024 open files, and let it ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        room = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (room, hard))


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{host}:{port}: cannot listen there: {reason}; choose another --host or --port") from error


# ------------------------------------------------------------------------------------------- connections


class GuardedConnection(H11Protocol):
    """uvicorn's connection, plus limits on clients that do nothing.

    uvicorn has no limit on how long a request head takes to arrive, nor on what an answered client still sends; here
    a connection without a request in work for `idle_timeout_s` is cut. Bodies have their own limit (`Bodies`). An
    answer is given to the transport as a whole, so that its client may still be taking it then: such a connection is
    cut when nothing of it was taken for `send_timeout_s`.

    uvicorn stops reading when a client sends ahead of its answer, and then does not learn that it went away; here it
    reads on up to `AHEAD_BYTES`. A body in tiny chunks costs an event each, so that few bytes keep all others waiting:
    a connection with more framing than body is cut.
    """

    idle_timeout_s: ClassVar[float]
    send_timeout_s: ClassVar[float]
    max_connections: ClassVar[int]

    _idle_timer: asyncio.TimerHandle | None = None
    _since: float = 0.0  # when it became idle, or when its request began
    _unsent: int = 0  # bytes of answers, when they last became fewer
    _taken_at: float = 0.0
    _received: int = 0  # bytes since the last request began
    _body: int = 0  # of these, of its body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None:
            with contextlib.suppress(OSError):  # asyncio's own doing only for sockets of a named protocol
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # unread answers are not kept for ever
                with contextlib.suppress(OSError):
                    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * self.send_timeout_s))
        self._next_event, self.conn.next_event = self.conn.next_event, self._count_event  # type: ignore[method-assign]
        self._start_idling()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_idling()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for first in range(0, len(data), SLICE_BYTES):
            if self.transport.is_closing():
                return
            piece = data[first : first + SLICE_BYTES]
            self._received += len(piece)
            super().data_received(piece)
            if self._receives_body() and self._received > FRAMING_BYTES + 2 * self._body:
                log.info("cut", extra={"reason": "more framing than body", "client": (self.client or ("",))[0]})
                self.transport.abort()

    def _count_event(self) -> Any:
        event = self._next_event()
        if isinstance(event, h11.Request):
            self._received = self._body = 0
        elif isinstance(event, h11.Data):
            self._body += len(event.data)
        return event

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # its answer has begun, before its body was whole
            self.transport.abort()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.flow.read_paused and not self._receives_body() and len(self.conn.trailing_data[0]) < AHEAD_BYTES:
            self.flow.resume_reading()
        if self.cycle is not before:
            self._since = self.loop.time()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_idling()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # may begin a request that was sent ahead
        if self.cycle.response_complete and (not self.transport.is_closing() or self._count_unsent()):
            self._start_idling()

    def _start_idling(self) -> None:
        self._stop_idling()
        self._since = self._taken_at = self.loop.time()
        self._unsent = self._count_unsent()
        self._idle_timer = self.loop.call_later(self.idle_timeout_s, self._end_idling)

    def _end_idling(self) -> None:
        unsent, now = self._count_unsent(), self.loop.time()
        if unsent < self._unsent:
            self._unsent, self._taken_at = unsent, now
        elif not unsent or now >= self._taken_at + self.send_timeout_s:
            self.transport.abort()
            return
        left = self._taken_at + self.send_timeout_s - now if unsent else self.idle_timeout_s
        self._idle_timer = self.loop.call_later(min(left, self.idle_timeout_s), self._end_idling)

    def _count_unsent(self) -> int:
        """Bytes that would be lost now: 0, or those here and, where the system tells, those that it still sends. Of
        the latter some go even when it takes none from here for long."""
        waiting = self.transport.get_write_buffer_size()
        peer = self.transport.get_extra_info("socket")
        if not waiting or peer is None:
            return waiting
        with contextlib.suppress(OSError, ValueError):  # closed, or a system that does not know the question
            waiting += struct.unpack("i", fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return waiting

    def _stop_idling(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _make_room(self) -> None:
        """Cut the longest waiting connection of the larger group: idle ones, or those whose bodies still arrive.

        A client that fills the server with one kind thus loses its own: a thousand half-sent bodies reset no kept
        connection, a thousand idle connections no upload. It is the newest itself when all others have a
        whole request in work."""
        alive = [c for c in self.connections if isinstance(c, GuardedConnection) and not c.transport.is_closing()]
        arriving = [c for c in alive if c._body_arrives()]
        idle = [c for c in alive if c._idle_timer is not None]
        group = arriving if len(arriving) >= len(idle) else idle
        if group:
            min(group, key=lambda c: c._since).transport.abort()

    def _receives_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY

    def _body_arrives(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body


def guarded_connection(settings: Settings) -> type[GuardedConnection]:
    """uvicorn makes connections itself, so that the limits have to be attributes of the class."""
    limits = {
        "idle_timeout_s": settings.idle_timeout_s,
        "send_timeout_s": settings.send_timeout_s,
        "max_connections": settings.max_connections,
    }
    return type("Connection", (GuardedConnection,), limits)
