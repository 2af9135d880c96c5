"""Every limit of the server in one place, and the one exception that becomes an answer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from deploy.core.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Settings of the server. Raises UserError for values that cannot work together."""

    max_batch: int = 16
    """Most images that one call of a runtime gets."""
    max_delay_ms: float = 3.0
    """How long an image waits for others that are still being decoded, so that they share a call."""
    max_queue: int = 256
    """Most images of a model inside the server: being decoded, waiting and running."""
    deadline_ms: float = 2000.0
    """A request that would wait longer than this before its images run is answered 429, at the door if that can be
    foreseen. A client may ask for less."""
    max_images: int = 32
    """Most images in one request."""
    max_bytes: int = 20 * MIB
    """Largest body of a request."""
    max_pixels: int = 32_000_000
    """Largest picture, checked before it is decoded. All pictures of a request together: `request_pixels`."""
    max_held_bytes: int = 256 * MIB
    """Bodies held in memory at one time, those that are still arriving included."""
    body_timeout_s: float = 15.0
    """A body that is not here by then is answered 408."""
    send_timeout_s: float = 30.0
    """A client that does not take its answer for this long is cut off."""
    idle_timeout_s: float = 15.0
    """A connection without a whole request head for this long is closed."""
    max_connections: int = 1000
    """Beyond it room is made by the longest waiting idle connection or, when these are more, half-sent body."""
    decode_workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    """Threads that decode pictures."""
    drain_s: float = 1.0
    """After SIGTERM the server says that it is not ready and goes on accepting for so long."""
    drain_timeout_s: float = 60.0
    """Accepted requests are answered, but no longer than this after the end of `drain_s`."""
    first_request_s: float = 1.0
    """Then, who connected before the end of `drain_s` has so long to send a first request."""
    allow_reload: bool = False
    """Whether clients may load a model's file again (`/v2/repository/models/…/load`). SIGHUP always does it."""
    token: str | None = field(default=None, repr=False)
    """Clients must send `Authorization: Bearer <token>`."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_images", "max_bytes", "max_pixels", "decode_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: must be at least 1, got {getattr(self, name)}")
        if self.max_queue < self.max_batch:
            raise UserError(
                f"--max-queue: {self.max_queue} is less than one batch (--max-batch {self.max_batch}); make it larger"
            )
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise UserError("the token must be printable ASCII and not empty")

    @property
    def request_pixels(self) -> int:
        """Most pixels of all pictures in one request: one client must not keep the decoders busy for long."""
        return 4 * self.max_pixels

    @property
    def images_a_request(self) -> int:
        """Most images that one request can bring: a request must fit into an empty queue."""
        return min(self.max_images, self.max_queue)


class RefusalError(Exception):
    """The request is answered with this status and message. The message is meant for the client: no paths."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class OverloadedError(RefusalError):
    """429: come back in `retry_after_s` seconds. `reason` is a label of the metrics."""

    def __init__(self, reason: str, wait_s: float) -> None:
        seconds = min(60, max(1, int(wait_s + 0.999)))
        super().__init__(429, f"overloaded ({reason}); try again in {seconds} s", retry_after_s=seconds)
        self.reason = reason
