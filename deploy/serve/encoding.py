"""Content-Encoding: request bodies are decoded piece by piece, within a limit; answers encoded as the client asks."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from deploy.serve.settings import RefusalError

WINDOWS = {"gzip": 31, "deflate": 15}
"""Codings that are taken and given, with zlib's window bits. `deflate` is zlib's format, as RFC 9110 has it."""
RAW = -15  # deflate without zlib's head and sum, which some clients send under the same name
MAX_MEMBERS = 1000  # of a gzip body; each costs an object, and an empty one has 20 bytes


class Decoder:
    """Undoes the codings that a request names in `Content-Encoding`.

    Raises RefusalError: 415 for another coding or several, 400 for a stream that is broken.
    """

    def __init__(self, headers: Iterable[str]) -> None:
        named = [coding for coding in _names(headers) if coding != "identity"]
        self._coding = named[0] if named else None
        if len(named) > 1 or (self._coding is not None and self._coding not in WINDOWS):
            raise RefusalError(
                415, f"Content-Encoding {', '.join(named)[:50]} is not taken: use one of {', '.join(WINDOWS)}, or none"
            )
        self._stream: zlib._Decompress | None = None
        self._begun = b""
        self._members = 0

    def decode(self, data: bytes, most: int) -> bytes:
        """The next bytes of the body, `most` of them at most: what is beyond is lost. most: at least 1."""
        if self._coding is None:
            return data[:most]
        out = bytearray()
        while data and len(out) < most:
            if self._stream is None or self._stream.eof:
                data = self._begun + data
                if len(data) < 2:  # its first two bytes tell the format
                    self._begun = data
                    break
                self._begun, self._stream = b"", self._start(data)
            try:
                out += self._stream.decompress(data, most - len(out))
            except zlib.error:
                raise self._broken("cannot be decoded") from None
            data = self._stream.unused_data
        return bytes(out)

    def finish(self) -> None:
        """The body is whole. Raises RefusalError 400 when its stream is not."""
        if self._coding is not None and (self._stream is None or not self._stream.eof or self._begun):
            raise self._broken("ends too early")

    def _start(self, data: bytes) -> zlib._Decompress:
        self._members += 1
        assert self._coding is not None
        if self._members > (MAX_MEMBERS if self._coding == "gzip" else 1):
            raise self._broken("has more after its end")
        zlib_head = data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
        return zlib.decompressobj(WINDOWS[self._coding] if self._coding == "gzip" or zlib_head else RAW)

    def _broken(self, how: str) -> RefusalError:
        return RefusalError(400, f"the {self._coding} body {how}")


def accepted(headers: Iterable[str]) -> str | None:
    """The coding that a client likes best, of those in `Accept-Encoding`; None: as it is. Of equals the first."""
    best, weight = None, 0.0
    for entry in ",".join(headers).split(","):
        name, _, parameters = entry.partition(";")
        coding = _known(name)
        quality = _quality(parameters)
        if (coding in WINDOWS or coding == "identity") and quality > weight:
            best, weight = coding, quality
    return best if best in WINDOWS else None


def encode(body: bytes, coding: str) -> bytes:
    """Compress quickly: an answer is small, and somebody waits for it."""
    stream = zlib.compressobj(level=1, wbits=WINDOWS[coding])
    return stream.compress(body) + stream.flush()


# ----------------------------------------------------------------------------------------------------


def _names(headers: Iterable[str]) -> list[str]:
    return [_known(name) for name in ",".join(headers).split(",") if name.strip()]


def _known(name: str) -> str:
    name = name.strip().lower()
    return "gzip" if name == "x-gzip" else name


def _quality(parameters: str) -> float:
    """The weight in 0..1; 0 for what is no number."""
    name, _, value = parameters.strip().partition("=")
    if name.strip().lower() != "q":
        return 1.0
    value = value.strip()
    return min(float(value), 1.0) if value.replace(".", "", 1).isdecimal() and value.isascii() else 0.0
