"""`/v1`: pictures in, detections or an annotated picture out; and the models with their cards."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from deploy.core.image import decode_image
from deploy.serve.answers import MAX_JPEG_SIDE, DetectAnswer, ModelAnswer, annotated_jpeg, image_answer
from deploy.serve.batching import Row, Ticket
from deploy.serve.bodies import media_type, multipart_files
from deploy.serve.decode import MEDIA_TYPES, Decoded, check_together, decode
from deploy.serve.models import Served
from deploy.serve.service import Service, admit, counted, error_answers, json_answer, run, timing_ms, unless_gone
from deploy.serve.settings import RefusalError


def add_detection(app: FastAPI, service: Service) -> None:
    """Detections of pictures."""
    pictures = {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}

    @app.post(
        "/v1/detect",
        summary="Detect objects in one picture, or in several",
        openapi_extra={"requestBody": _pictures_body(service.settings.images_a_request)},
        response_class=Response,
        responses={
            200: {"model": DetectAnswer, "description": "Detections; with `annotate` a JPEG", "content": pictures},
            **error_answers(400, 401, 404, 408, 413, 415, 422, 429, 503),
        },
    )
    async def detect(
        request: Request,
        model: Annotated[str | None, Query(description="Default: the first one.")] = None,
        min_score: Annotated[
            float | None,
            Query(ge=0, le=1, description="Leave out what scores less. Default: 0; to annotate, the operating point."),
        ] = None,
        annotate: Annotated[bool, Query(description="Answer with the picture, boxes drawn into it.")] = False,
        deadline_ms: Annotated[
            float | None, Query(gt=0, description="Longest wait; the server's own limit stays.")
        ] = None,
    ) -> Response:
        """Send the file itself as the body, or one or several as parts of multipart/form-data.

        JPEG, PNG, WebP, BMP and GIF, whatever the Content-Type says; of an animation the first picture."""
        name = service.models.get(model).name  # an unknown model is told before the body is read
        async with counted(service, name), service.bodies.read(request) as data:
            received = time.monotonic()
            pictures = await _pictures(request, data, service.settings.images_a_request)
            if annotate and len(pictures) != 1:
                raise RefusalError(400, "annotate takes one picture")
            served = service.models.get(model)
            with admit(service, served, len(pictures), None if deadline_ms is None else deadline_ms / 1e3) as ticket:
                work = detect_pictures(service, served, ticket, pictures)
                decoded, rows, decode_s = await unless_gone(request, work)
                least = min_score if min_score is not None else served.card.shown_score if annotate else 0.0
                images = [image_answer(*pair, served.card, least) for pair in zip(rows, decoded, strict=True)]
                if annotate and max(decoded[0].size_hw) > MAX_JPEG_SIDE:
                    raise RefusalError(413, f"annotate takes pictures of at most {MAX_JPEG_SIDE} pixels a side")
                stages = {"decode": decode_s}
                if annotate:  # decoded once more: pixels of many waiting pictures would fill the memory
                    start, found = time.monotonic(), images[0]["detections"]
                    drawn = await service.in_pool(lambda: annotated_jpeg(decode_image(pictures[0]), found))
                    stages["draw"] = time.monotonic() - start
                timing = timing_ms(service, request, served, rows, received, stages)
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
        return json_answer(answer)


def add_models(app: FastAPI, service: Service) -> None:
    """The models with their cards."""

    @app.get("/v1/models", summary="The models and their cards", responses={**error_answers(401)})
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


async def detect_pictures(
    service: Service, served: Served, ticket: Ticket, pictures: list[bytes]
) -> tuple[list[Decoded], list[Row], float]:
    """Decode the pictures, find their objects, and say how many seconds the first took.

    Raises OverloadedError when the deadline passes, on time: pictures of others may keep all decoders busy.
    """
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
    rows = await run(service, served, ticket, [item.canvas for item in decoded])
    return decoded, rows, decode_s


# ----------------------------------------------------------------------------------------------------


def _pictures_body(most: int) -> dict[str, Any]:
    """The body of a request with up to `most` pictures, for the OpenAPI document."""
    picture = {"schema": {"type": "string", "format": "binary", "contentMediaType": "image/*"}}
    files = {"type": "array", "minItems": 1, "maxItems": most}
    return {
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
