"""The outermost layer of the application: request ids, the token, logs, counting, and no traceback in any answer."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.serve.bodies import ClientGoneError
from deploy.serve.metrics import Metrics
from deploy.serve.settings import RefusalError

log = logging.getLogger("compress.serve")
PROBES = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
OPEN_PATHS = {"/", "/docs", *PROBES}
"""Need no token, as the files of the page: probes have none, and the page asks for it."""
OPEN_PREFIX = "/page/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SECURITY = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Middleware:
    """Wraps the application. While `draining`, answers ask the client to close its connection.

    shed: path, query → a refusal that needs no more of the request, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        send_timeout_s: float,
        metrics: Metrics,
        shed: Callable[[str, bytes], RefusalError | None],
    ) -> None:
        self._app, self._send_timeout_s, self._metrics, self._shed = app, send_timeout_s, metrics, shed
        self._token = None if token is None else token.encode()
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self)
        self._metrics.in_progress.inc()
        try:
            if not self._allowed(scope):
                await exchange.refuse(RefusalError(401, "a token is needed: Authorization: Bearer <token>"))
            elif scope["method"] == "POST" and (refusal := self._shed(scope["path"], scope["query_string"])):
                exchange.route = "shed"
                await exchange.refuse(refusal)
            else:
                await self._app(scope, receive, exchange.send)
        except ClientGoneError:
            exchange.status = 499
        except TimeoutError:
            exchange.status = 499  # it does not read its answer; uvicorn closes what was begun
        except Exception as error:
            exchange.error = error
            if exchange.status == 0:
                await exchange.refuse(RefusalError(500, "internal error; the log has more under this request id"))
        finally:
            self._metrics.in_progress.dec()
            exchange.done(self._metrics)

    def _allowed(self, scope: Scope) -> bool:
        if self._token is None or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_PREFIX):
            return True
        given = next((value for key, value in scope["headers"] if key == b"authorization"), b"")
        kind, _, token = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


def refusal_body(refusal: RefusalError, request_id: str) -> bytes:
    """The JSON of an `ErrorAnswer`."""
    return json.dumps({"error": refusal.message, "request_id": request_id}).encode()


def refusal_headers(refusal: RefusalError) -> dict[str, str]:
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return {**headers, "WWW-Authenticate": "Bearer"} if refusal.status == 401 else headers


_RECORD = logging.makeLogRecord({}).__dict__.keys() | {"message", "asctime", "taskName", "color_message"}


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{key: value for key, value in record.__dict__.items() if key not in _RECORD},
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(level: str) -> None:
    """Everything that is logged, to stderr: our requests from `level` on, of other packages warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)  # Pillow warns of damaged pictures
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # its warnings are our answers with 400
    log.setLevel(level.upper())


# ----------------------------------------------------------------------------------------------------


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, send: Send, middleware: Middleware) -> None:
        self.start = time.monotonic()
        self.status = 0
        self.error: Exception | None = None
        self.route: str | None = None
        self._scope, self._send, self._middleware = scope, send, middleware
        given = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=self.request_id, start=self.start)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            present = {key for key, _ in headers}
            headers = [*headers, *(pair for pair in _SECURITY if pair[0] not in present)]
            headers.append((b"x-request-id", self.request_id.encode()))
            if self._middleware.draining:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        async with asyncio.timeout(self._middleware._send_timeout_s):
            await self._send(message)

    async def refuse(self, refusal: RefusalError) -> None:
        body = refusal_body(refusal, self.request_id)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal_headers(refusal)}
        raw = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})

    def done(self, metrics: Metrics) -> None:
        method = self._scope["method"] if self._scope["method"] in ("GET", "POST", "HEAD") else "other"
        metrics.requests.labels(self._route(), method, str(self.status)).inc()
        if self.status == 499:
            metrics.gone.inc()
        quiet = self._scope["path"] in PROBES or self._scope["path"] == "/metrics"
        log.log(
            logging.ERROR if self.error else logging.DEBUG if quiet else logging.INFO,
            "request",
            exc_info=self.error,
            extra={
                "request_id": self.request_id,
                "method": self._scope["method"],
                "path": self._scope["path"][:200],
                "status": self.status,
                "ms": round(1e3 * (time.monotonic() - self.start), 2),
                "client": (self._scope.get("client") or ("",))[0],
            },
        )

    def _route(self) -> str:
        """The pattern of the path, so that clients cannot make new time series."""
        return self.route or getattr(self._scope.get("route"), "path", None) or "none"
