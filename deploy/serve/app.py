"""Routes: `/v1/detect` for pictures, `/v2` for tensors, probes, metrics and the web page.

A detection request goes: body (bounded, before anything is taken) → place in the model's queue, or 429 → decoding in
the pool → batcher → answer. When its client goes away, it gives back its place at whatever point it is.
"""

from __future__ import annotations

import asyncio
import json
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata, resources
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from deploy.core.image import decode_image
from deploy.serve import protocol
from deploy.serve.answers import MAX_JPEG_SIDE, DetectAnswer, ErrorAnswer, ModelAnswer, annotated_jpeg, image_answer
from deploy.serve.batching import InferenceError, Row, Ticket
from deploy.serve.bodies import Bodies, ClientGoneError, media_type, multipart_files
from deploy.serve.decode import MEDIA_TYPES, Decoded, check_together, decode
from deploy.serve.metrics import Metrics
from deploy.serve.middleware import refusal_body, refusal_headers
from deploy.serve.models import Models, Served
from deploy.serve.settings import OverloadedError, RefusalError, Settings

_DESCRIPTION = """Detects objects in pictures. Pictures go to `/v1/detect`; clients of the Open Inference Protocol
(KServe, Triton) find it under `/v2`. Every answer carries `X-Request-Id`."""


@dataclass
class Service:
    """What the routes work with. `draining` is set when the server is asked to end."""

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
        if path == "/v1/detect" and b"model" not in query:
            name = self.models.names[0]
        elif path.startswith("/v2/models/") and path.endswith("/infer"):
            name = path.split("/")[3]
        else:
            return None
        batcher = self.models.batcher(name)
        refusal = None if batcher is None else batcher.refusal(1, self.settings.deadline_ms / 1e3)
        if refusal is not None:
            self.metrics.rejected.labels(name, refusal.reason).inc()
        return refusal

    async def in_pool(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)


def create_app(service: Service) -> FastAPI:
    """The application; `deploy.serve.middleware.Gate` belongs around it."""
    app = FastAPI(
        title="compress serve",
        description=_DESCRIPTION,
        version=metadata.version("compress-detectors"),
        docs_url=None,  # FastAPI's own pages load scripts from the internet
        redoc_url=None,
    )
    _add_errors(app)
    _add_detect(app, service)
    _add_probes(app, service)
    _add_protocol(app, service)
    _add_page(app)
    return app


# ---------------------------------------------------------------------------------------------- /v1


def _add_detect(app: FastAPI, service: Service) -> None:
    picture = {"schema": {"type": "string", "format": "binary", "contentMediaType": "image/*"}}
    files = {"type": "array", "minItems": 1, "maxItems": service.settings.images_a_request}
    body = {
        "required": True,
        "content": {
            **dict.fromkeys(MEDIA_TYPES, picture),
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {**files, "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
    pictures = {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}

    @app.post(
        "/v1/detect",
        summary="Detect objects in one picture, or in several",
        openapi_extra={"requestBody": body},
        response_class=Response,
        responses={
            200: {"model": DetectAnswer, "description": "Detections; with `annotate` a JPEG", "content": pictures},
            **_errors(400, 401, 404, 408, 413, 415, 422, 429, 503),
        },
    )
    async def detect(
        request: Request,
        model: Annotated[str | None, Query(description="Default: the first one.")] = None,
        min_score: Annotated[float, Query(ge=0, le=1, description="Leave out what scores less.")] = 0.0,
        annotate: Annotated[bool, Query(description="Answer with the picture, boxes drawn into it.")] = False,
        deadline_ms: Annotated[
            float | None, Query(gt=0, description="Longest wait; the server's own limit stays.")
        ] = None,
    ) -> Response:
        """Send the file itself as the body, or one or several as parts of multipart/form-data.

        JPEG, PNG, WebP, BMP and GIF, whatever the Content-Type says; of an animation the first picture."""
        name = service.models.get(model).name  # an unknown model is told before the body is read
        async with _counted(service, name), service.bodies.read(request) as data:
            received = time.monotonic()
            pictures = await _pictures(request, data, service.settings.images_a_request)
            if annotate and len(pictures) != 1:
                raise RefusalError(400, "annotate takes one picture")
            served = service.models.get(model)
            with _admit(service, served, len(pictures), None if deadline_ms is None else deadline_ms / 1e3) as ticket:
                work = _detect(service, served, ticket, pictures)
                decoded, rows, decode_s = await _unless_gone(request, work)
                images = [image_answer(*pair, served.card, min_score) for pair in zip(rows, decoded, strict=True)]
                if annotate and max(decoded[0].size_hw) > MAX_JPEG_SIDE:
                    raise RefusalError(413, f"annotate takes pictures of at most {MAX_JPEG_SIDE} pixels a side")
                stages = {"decode": decode_s}
                if annotate:  # decoded once more: pixels of many waiting pictures would fill the memory
                    start, found = time.monotonic(), images[0]["detections"]
                    drawn = await service.in_pool(lambda: annotated_jpeg(decode_image(pictures[0]), found))
                    stages["draw"] = time.monotonic() - start
                timing = _timing(service, request, served, rows, received, stages)
                if annotate:
                    listed = ", ".join(f"{stage};dur={ms}" for stage, ms in timing.items())
                    return Response(drawn, media_type="image/jpeg", headers={"Server-Timing": listed})
        answer = {
            "model": served.name,
            "images": images,
            "batch": rows[-1].batch,
            "timing_ms": timing,
            "request_id": request.state.request_id,
        }
        return _json(answer)

    @app.get("/v1/models", summary="The models and their cards", responses={**_errors(401)})
    async def models() -> list[ModelAnswer]:
        """The card is what the file says about itself: classes, input size, thresholds, mAP, versions."""
        found = []
        for name in service.models.names:
            if service.models.is_ready(name):
                served = service.models.get(name)
                card = served.card.model_dump(mode="json")
                found.append(ModelAnswer(name=name, ready=True, backend=served.runner.backend, card=card))
            else:
                found.append(ModelAnswer(name=name, ready=False))
        return found


async def _pictures(request: Request, data: bytes, most: int) -> list[bytes]:
    kind = media_type(request)
    if kind == "multipart/form-data":
        files = await multipart_files(request, data, max_files=most)
        if not files:
            raise RefusalError(400, "no file among the parts: give each a filename")
        return files
    # curl calls whatever --data-binary sends a form
    if kind.startswith("image/") or kind in ("", "application/octet-stream", "application/x-www-form-urlencoded"):
        if not data:
            raise RefusalError(400, "the body is empty: send the picture as the body")
        return [data]
    raise RefusalError(415, "send a picture, or pictures as multipart/form-data")


async def _detect(
    service: Service, served: Served, ticket: Ticket, pictures: list[bytes]
) -> tuple[list[Decoded], list[Row], float]:
    """Raises OverloadedError when the deadline passes, on time: pictures of others may keep all decoders busy."""
    start = time.monotonic()

    def check() -> None:
        if len(pictures) > 1 and ticket.left_s > 0:
            check_together(pictures, max_pixels=service.settings.request_pixels)

    def decode_one(index: int) -> Decoded:
        if ticket.left_s <= 0:
            raise ticket.late()
        return decode(
            pictures[index],
            served.card,
            max_pixels=service.settings.max_pixels,
            where="image" if len(pictures) == 1 else f"image {index}",
        )

    decoding: list[asyncio.Future[Decoded]] = []
    try:
        async with asyncio.timeout(max(0.0, ticket.left_s)):
            if len(pictures) > 1:
                await service.in_pool(check)
            decoding += [asyncio.ensure_future(service.in_pool(partial(decode_one, i))) for i in range(len(pictures))]
            decoded: list[Decoded] = await asyncio.gather(*decoding)
    except TimeoutError:
        raise ticket.late() from None
    finally:
        for future in decoding:  # of those that have not begun
            future.cancel()
    decode_s = time.monotonic() - start
    rows = await _run(service, served, ticket, [item.canvas for item in decoded])
    return decoded, rows, decode_s


# ---------------------------------------------------------------------------------------------- /v2


def _add_protocol(app: FastAPI, service: Service) -> None:
    models = service.models

    @app.get("/v2", summary="Server metadata", responses={**_errors(401)})
    async def server() -> dict[str, Any]:
        return {
            "name": "compress",
            "version": app.version,
            "extensions": protocol.extensions(reload=service.settings.allow_reload),
        }

    @app.get("/v2/health/live", summary="The server answers")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="All models take requests", responses={503: {"description": "Not yet"}})
    async def ready() -> Response:
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    async def described(name: str, version: str = protocol.VERSION) -> Response:
        """Inputs and outputs of a model."""
        _known(models, name, version)
        served = models.get(name)
        return _json(protocol.model_metadata(name, served.runner.backend, served.card))

    async def is_ready(name: str, version: str = protocol.VERSION) -> Response:
        """Whether the model takes requests: 200 or 503."""
        _known(models, name, version)
        found = models.is_ready(name) and not service.draining
        return _json({"name": name, "ready": found}, 200 if found else 503)

    async def infer(request: Request, name: str, version: str = protocol.VERSION) -> Response:
        """Tensor `images` UINT8 [n, 3, H, W], RGB, in; boxes in pixels of that canvas out.

        In JSON, or binary after a JSON header whose length `Inference-Header-Content-Length` says. The request
        parameter `timeout` (microseconds) shortens the deadline."""
        _known(models, name, version)
        card = models.get(name).card
        async with _counted(service, name), service.bodies.read(request) as data:
            header = request.headers.get(protocol.HEADER_LENGTH)
            most = service.settings.images_a_request
            parsed = await service.in_pool(lambda: protocol.parse_infer(data, header, card, most))
            received = time.monotonic()
            served = models.get(name)
            if served.card.input_size != card.input_size:  # loaded again in the meantime
                raise RefusalError(409, "the model changed its input size; ask for its metadata")
            with _admit(service, served, len(parsed.images), parsed.deadline_s) as ticket:
                rows = await _unless_gone(request, _run(service, served, ticket, list(parsed.images)))
        _timing(service, request, served, rows, received, {})
        body, length = protocol.answer_infer(name, parsed, rows, served.card.max_detections)
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={protocol.HEADER_LENGTH: str(length)})

    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "name": {"const": "images"},
            "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
            "datatype": {"const": "UINT8"},
            "data": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
        },
    }
    wanted = {"type": "object", "required": ["name"], "properties": {"name": {"enum": list(protocol.OUTPUTS)}}}
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object", "properties": {"timeout": {"type": "integer", "minimum": 0}}},
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": wanted, "maxItems": len(protocol.OUTPUTS)},
        },
        "additionalProperties": False,
    }
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    binary: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/octet-stream": {}}, "description": "Tensors, in JSON or binary"}
    }
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        more = " of a version" if "version" in base else ""
        app.get(base, summary=f"Model metadata{more}", responses=_errors(401, 404, 503))(described)
        app.get(f"{base}/ready", summary=f"Readiness{more}", responses=_errors(401, 404, 503))(is_ready)
        app.post(
            f"{base}/infer",
            summary=f"Infer{more}",
            openapi_extra=body,
            responses={**binary, **_errors(400, 401, 404, 408, 409, 413, 415, 429, 503)},
        )(infer)

    @app.post("/v2/repository/index", summary="The models and their state", responses={**_errors(401)})
    async def index() -> list[dict[str, str]]:
        return [
            {
                "name": name,
                "version": protocol.VERSION,
                "state": "READY" if models.is_ready(name) else "UNAVAILABLE",
                "reason": "" if models.is_ready(name) else "warming up",
            }
            for name in models.names
        ]

    @app.post(
        "/v2/repository/models/{name}/load",
        summary="Load a model's file again",
        responses=_errors(400, 401, 403, 404),
    )
    async def load(name: str) -> dict[str, str]:
        """The old one serves until the new one is warm. Only with `--allow-reload`; nothing in the body is looked
        at: the file is the one that the server was started with."""
        if not service.settings.allow_reload:
            raise RefusalError(403, "reloading is not allowed here: compress serve --allow-reload, or SIGHUP")
        await models.reload(name)
        return {"name": name, "state": "READY"}


def _known(models: Models, name: str, version: str) -> None:
    models.is_ready(name)  # RefusalError 404
    if version != protocol.VERSION:
        raise RefusalError(404, f"no such version; there is: {protocol.VERSION}")


# ------------------------------------------------------------------------------ what both have in common


def _admit(service: Service, served: Served, images: int, deadline_s: float | None) -> Ticket:
    """Raises OverloadedError."""
    limit = service.settings.deadline_ms / 1e3
    return served.batcher.admit(images, limit if deadline_s is None else min(limit, deadline_s))


@asynccontextmanager
async def _counted(service: Service, name: str) -> AsyncIterator[None]:
    """Overload of any reason, while the body arrives, at the door or in the queue, is counted."""
    try:
        yield
    except OverloadedError as error:
        service.metrics.rejected.labels(name, error.reason).inc()
        raise


async def _run(service: Service, served: Served, ticket: Ticket, canvases: list[np.ndarray]) -> list[Row]:
    rows = await ticket.detect(canvases)
    service.metrics.images.labels(served.name).inc(len(rows))
    return rows


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
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


def _timing(
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
    return {stage: round(1e3 * value, 3) for stage, value in seconds.items()}


# ---------------------------------------------------------------------------------- probes, page, errors


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="All models take requests", responses={503: {"description": "Not yet, or no more"}})
    async def readyz() -> Response:
        """With what really runs each model."""
        rows = []
        for name in service.models.names:
            warm = service.models.is_ready(name)
            rows.append({
                "name": name,
                "ready": warm,
                "backend": service.models.get(name).runner.backend if warm else None,
            })  # fmt: skip
        answer = {"ready": service.ready, "draining": service.draining, "models": rows}
        return _json(answer, 200 if service.ready else 503)

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses={**_errors(401)})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    folder = resources.files("deploy.serve") / "page"
    files = {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}

    def show(name: str) -> Response:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind += "; charset=utf-8" if kind.startswith("text/") else ""
        return Response(files[name], headers={"Content-Type": kind, "Cache-Control": "no-cache"})

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return show("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return show("docs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        if name not in files:
            raise RefusalError(404, "no such file")
        return show(name)


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, refusal: RefusalError, headers: dict[str, str] | None = None) -> Response:
        body = refusal_body(refusal, request.state.request_id)
        both = {**refusal_headers(refusal), **(headers or {})}
        return Response(body, refusal.status, both, media_type="application/json")

    @app.exception_handler(RefusalError)
    async def refused(request: Request, error: RefusalError) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return answer(request, RefusalError(error.status_code, str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return answer(request, RefusalError(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))

    @app.exception_handler(InferenceError)
    async def failed(request: Request, error: InferenceError) -> Response:
        return answer(request, RefusalError(500, "inference failed; the log has more"))

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # for the log; nobody reads it

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # it goes on to the gate, which logs it
        return answer(request, RefusalError(500, "internal error; the log has more under this request id"))


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
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


def _json(content: Any, status: int = 200) -> Response:
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return Response(body, status, media_type="application/json")
