"""Request bodies of any client: bounded in bytes, in time, and all together in memory.

Nothing here holds a place in a model's queue: that is taken when the body has arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from deploy.serve.encoding import Decoder
from deploy.serve.settings import OverloadedError, RefusalError


class ClientGoneError(Exception):
    """The client closed the connection and will not read an answer."""


class Bodies:
    """Reads bodies; knows how many bytes of them are in memory."""

    def __init__(self, *, max_bytes: int, max_held_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._max_held_bytes, self._timeout_s = max_bytes, max_held_bytes, timeout_s
        self.held_bytes = 0
        self._arriving: dict[_Reading, None] = {}  # in order of arrival

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, decompressed; its memory counts as held until the block is left. The limit holds for what
        arrives and for what it decompresses to.

        Raises RefusalError 400 (a broken compressed stream), 408 (too slow), 413 (too large), 415 (compressed in
        another way), OverloadedError (no memory left, or given to newcomers), and ClientGoneError.
        """
        decoder = Decoder(request.headers.getlist("content-encoding"))
        if _declared_length(request) > self._max_bytes:
            raise self._too_large()
        copies = 2 if media_type(request) == "multipart/form-data" else 1  # the body and its parts
        reading = _Reading(asyncio.timeout(self._timeout_s), copies)
        try:
            yield await self._read(request, reading, decoder)
        finally:
            self.held_bytes -= reading.held

    async def _read(self, request: Request, reading: _Reading, decoder: Decoder) -> bytes:
        body = bytearray()
        received = 0
        self._arriving[reading] = None
        try:
            async with reading.limit:
                async for chunk in request.stream():
                    received += len(chunk)
                    piece = decoder.decode(chunk, self._max_bytes - len(body) + 1)
                    if max(received, len(body) + len(piece)) > self._max_bytes:
                        raise self._too_large()
                    self._hold(reading.copies * len(piece), reading)
                    body += piece
            decoder.finish()
        except ClientDisconnect:
            raise ClientGoneError from None
        except TimeoutError:
            if reading.evicted:
                raise _no_memory() from None
            raise RefusalError(408, "the body did not arrive in time") from None
        finally:
            self._arriving.pop(reading, None)
        return bytes(body)

    def _hold(self, count: int, reading: _Reading) -> None:
        """Make room when memory runs out, at the cost of the bodies that have been arriving longest: slow clients do
        not keep others out."""
        while self.held_bytes + count > self._max_held_bytes:
            oldest = next(iter(self._arriving), reading)  # none, when this one had to make room itself
            if oldest is reading:
                raise _no_memory()
            del self._arriving[oldest]
            self.held_bytes -= oldest.held
            oldest.held, oldest.evicted = 0, True
            if not oldest.limit.expired():
                oldest.limit.reschedule(asyncio.get_running_loop().time())
        self.held_bytes += count
        reading.held += count

    def _too_large(self) -> RefusalError:
        return RefusalError(413, f"the body is too large: at most {self._max_bytes} bytes are taken, decompressed too")


async def multipart_files(request: Request, body: bytes, *, max_files: int) -> list[bytes]:
    """The contents of all parts that are files, in order. Raises RefusalError 400, and 413 for too many."""
    return (await multipart_parts(request, body, max_files=max_files))[0]


async def multipart_parts(request: Request, body: bytes, *, max_files: int) -> tuple[list[bytes], dict[str, str]]:
    """The contents of all parts that are files, in order, and the others by name. Raises RefusalError as
    `multipart_files` does."""

    async def whole() -> AsyncIterator[bytes]:
        yield body

    parser = _InMemory(request.headers, whole(), max_files=max_files, max_fields=16)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
        parts = form.multi_items()
        fields = {name: part for name, part in parts if isinstance(part, str)}
        return [await part.read() for _, part in parts if isinstance(part, UploadFile)], fields
    except (MultiPartException, FormParserError) as error:
        message = getattr(error, "message", "cannot be parsed")
        raise RefusalError(413 if message.startswith("Too many") else 400, f"bad multipart body: {message}") from error
    except (ValueError, LookupError) as error:  # codecs that the client names: `undefined`, `punycode` ...
        raise RefusalError(400, "bad multipart body: its names cannot be read; use UTF-8") from error


# ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Reading:
    limit: asyncio.Timeout
    copies: int
    held: int = 0
    evicted: bool = False


class _InMemory(MultiPartParser):
    spool_max_size = 2**62  # never a temporary file: the body is in memory anyway


def media_type(request: Request) -> str:
    """Media type of the body in lower case, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _no_memory() -> OverloadedError:
    return OverloadedError("too many bodies at one time", 1.0)


def _declared_length(request: Request) -> int:
    text = request.headers.get("content-length", "0")
    return int(text) if text.isdecimal() and len(text) < 19 else 0
