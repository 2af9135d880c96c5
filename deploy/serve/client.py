"""A client of `compress serve`, with the standard library.

    from deploy.serve.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for found in client.detect("street.jpg"):
            print(found.class_name, found.score, found.box)

A client keeps one connection open and belongs to one thread.
"""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.core.image import Picture, check_pixels, read_image_bytes, rgb


class ServerError(UserError):
    """The server refused, or cannot be reached (then `status` is 0)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """A connection to a server. Pixels and PIL images are sent as PNG, so that nothing is lost.

    url: of the server. token: what it was started with. timeout_s: of one answer. retries: how often an overloaded
    server (429, 503) is asked again, after the time that it names.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 30.0, retries: int = 3) -> None:
        wrong = UserError(f"{url}: not the address of a server, such as http://127.0.0.1:8000")
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:  # brackets that do not close, a port that is none
            raise wrong from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise wrong
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise UserError("the token must be printable ASCII and not empty")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, port, timeout=timeout_s)
        self._url, self._base, self._retries = url, parts.path.rstrip("/"), retries
        self._classes: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}  # of each model: names, category ids
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def detect(
        self, picture: Picture, *, model: str | None = None, min_score: float = 0.0, deadline_ms: float | None = None
    ) -> Detections:
        """Detections of one picture, highest score first. Raises ServerError, and UserError for a missing file."""
        query = {"model": model, "min_score": min_score or None, "deadline_ms": deadline_ms}
        answer = json.loads(self._ask("POST", "/v1/detect", query, _encoded(picture), "application/octet-stream"))
        return self._detections(answer["model"], [answer["images"][0]], [picture])[0]

    def detect_many(
        self,
        pictures: Sequence[Picture],
        *,
        model: str | None = None,
        min_score: float = 0.0,
        deadline_ms: float | None = None,
    ) -> list[Detections]:
        """Several pictures in one request: all are answered, or none."""
        boundary = uuid.uuid4().hex
        parts = [
            b'--%s\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n\r\n%s\r\n'
            % (boundary.encode(), index, _encoded(picture))
            for index, picture in enumerate(pictures)
        ]
        body = b"".join([*parts, b"--%s--\r\n" % boundary.encode()])
        query = {"model": model, "min_score": min_score or None, "deadline_ms": deadline_ms}
        answer = json.loads(self._ask("POST", "/v1/detect", query, body, f"multipart/form-data; boundary={boundary}"))
        return self._detections(answer["model"], answer["images"], pictures)

    def annotate(self, picture: Picture, *, model: str | None = None, min_score: float | None = None) -> bytes:
        """The picture as a JPEG with its boxes. min_score: None: the model's operating point (`card.shown_score`)."""
        query = {"model": model, "min_score": min_score, "annotate": 1}
        return self._ask("POST", "/v1/detect", query, _encoded(picture), "application/octet-stream")

    def models(self) -> list[dict[str, Any]]:
        """Name, readiness, backend and card of every model."""
        found: list[dict[str, Any]] = json.loads(self._ask("GET", "/v1/models"))
        return found

    def ready(self) -> bool:
        """Tell whether all models take requests; False also where no server answers."""
        try:
            return self._once("GET", "/readyz", None, {})[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------

    def _detections(
        self, model: str, images: Sequence[dict[str, Any]], pictures: Sequence[Picture]
    ) -> list[Detections]:
        """Answers as arrays. The names of all classes come from the model's card, which is asked for once, and again
        when an answer does not fit it: then the server has loaded another file."""
        found = [row for image in images for row in image["detections"]]
        if model not in self._classes or not all(_named_so(self._classes[model][0], row) for row in found):
            for row in self.models():
                if row["card"] is not None:
                    card = row["card"]
                    self._classes[row["name"]] = (tuple(card["class_names"]), tuple(card["category_ids"]))
        names, ids = self._classes[model]
        if not all(_named_so(names, row) for row in found):
            raise ServerError(200, f"{self._url}: model {model} was replaced during the request; ask again")
        return [
            Detections(
                np.array([row["box"] for row in image["detections"]], np.float32).reshape(-1, 4),
                np.array([row["score"] for row in image["detections"]], np.float32),
                np.array([row["label"] for row in image["detections"]], np.int64),
                names,
                ids,
                Path(picture) if isinstance(picture, str | Path) else None,
            )
            for image, picture in zip(images, pictures, strict=True)
        ]

    def _ask(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: bytes | None = None, kind: str = ""
    ) -> bytes:
        given = {key: value for key, value in (query or {}).items() if value is not None}
        target = f"{path}?{urllib.parse.urlencode(given)}" if given else path
        headers = {**self._headers, **({"Content-Type": kind} if kind else {})}
        for attempt in range(self._retries + 1):
            try:
                status, answer, retry_after_s = self._once(method, target, body, headers)
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(0, f"{self._url}: {str(error) or type(error).__name__}") from error
            if status == 200:
                return answer
            if status not in (429, 503) or attempt == self._retries:
                break
            time.sleep(retry_after_s)
        raise ServerError(status, f"{self._url}: {status}: {_message(answer)}")

    def _once(self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> tuple[int, bytes, int]:
        """Status, body and seconds to wait. A kept connection that the server has closed meanwhile is made again."""
        kept = self._connection.sock is not None
        try:
            return self._exchange(method, target, body, headers)
        except (ConnectionError, http.client.BadStatusLine):
            self._connection.close()
            if not kept:
                raise
            return self._exchange(method, target, body, headers)
        except BaseException:
            self._connection.close()  # an answer that was not read would be the next one's
            raise

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, bytes, int]:
        self._connection.request(method, self._base + target, body, dict(headers))
        response = self._connection.getresponse()
        seconds = response.headers.get("Retry-After", "1")
        return response.status, response.read(), int(seconds) if seconds.isdecimal() else 1


def _encoded(picture: Picture) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return read_image_bytes(Path(picture))
    pixels = check_pixels(picture) if isinstance(picture, np.ndarray) else rgb(picture)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _named_so(names: Sequence[str], row: Mapping[str, Any]) -> bool:
    """Tell whether the class of an answer is what the card calls it."""
    return row["label"] < len(names) and bool(names[row["label"]] == row["class_name"])


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"])
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode("utf-8", "replace")
