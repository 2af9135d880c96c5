"""`/v2`: the Open Inference Protocol of KServe and Triton (`deploy.serve.protocol`) as routes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from deploy.serve import encoding, protocol
from deploy.serve.models import Models
from deploy.serve.service import Service, admit, counted, error_answers, json_answer, run, timing_ms, unless_gone
from deploy.serve.settings import RefusalError


def add_server(app: FastAPI, service: Service) -> None:
    """Metadata and health of the server."""

    @app.get("/v2", summary="Server metadata", responses={**error_answers(401)})
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
        return json_answer({"ready": service.ready}, 200 if service.ready else 503)


def add_inference(app: FastAPI, service: Service) -> None:
    """Metadata, readiness and inference of each model."""
    models = service.models

    async def described(name: str, version: str = protocol.VERSION) -> Response:
        """Inputs and outputs of a model."""
        _known(models, name, version)
        served = models.get(name)
        return json_answer(protocol.model_metadata(name, served.runner.backend, served.card))

    async def is_ready(name: str, version: str = protocol.VERSION) -> Response:
        """Answer whether the model takes requests: 200 or 503."""
        _known(models, name, version)
        found = models.is_ready(name) and not service.draining
        return json_answer({"name": name, "ready": found}, 200 if found else 503)

    async def config(name: str, version: str = protocol.VERSION) -> Response:
        """What applies of Triton's `ModelConfig`: tensors without their batch, batching, classes."""
        _known(models, name, version)
        served = models.get(name)
        return json_answer(protocol.model_config(name, served.runner.backend, served.card, service.settings))

    async def statistics(name: str, version: str = protocol.VERSION) -> Response:
        """Counts and durations since the server started, also of requests to `/v1/detect`."""
        _known(models, name, version)
        return json_answer(_statistics(service, [name]))

    @app.get("/v2/models/stats", summary="Statistics of all models", responses={**error_answers(401)})
    async def all_statistics() -> Response:
        """A model that is called `stats` is described under its version."""
        return json_answer(_statistics(service, models.names))

    async def infer(request: Request, name: str, version: str = protocol.VERSION) -> Response:
        """Tensor `images` UINT8 [n, 3, H, W], RGB, in; boxes in pixels of that canvas out.

        In JSON, or binary after a JSON header whose length `Inference-Header-Content-Length` says. The request
        parameter `timeout` (microseconds) shortens the deadline."""
        _known(models, name, version)
        card = models.get(name).card
        async with counted(service, name), service.bodies.read(request) as data:
            header = request.headers.get(protocol.HEADER_LENGTH)
            most = service.settings.images_a_request
            parsed = await service.in_pool(lambda: protocol.parse_infer(data, header, card, most))
            received = time.monotonic()
            served = models.get(name)
            if served.card.input_size != card.input_size:  # loaded again in the meantime
                raise RefusalError(409, "the model changed its input size; ask for its metadata")
            with admit(service, served, len(parsed.images), parsed.deadline_s) as ticket:
                rows = await unless_gone(request, run(service, served, ticket, list(parsed.images)))
        timing_ms(service, request, served, rows, received, {})
        body, length = protocol.answer_infer(name, parsed, rows, served.card.max_detections)
        headers = {"Vary": "Accept-Encoding"}
        if length is not None:
            headers[protocol.HEADER_LENGTH] = str(length)
        coding = encoding.accepted(request.headers.getlist("accept-encoding"))
        if coding is not None:
            headers["Content-Encoding"] = coding
            body = await service.in_pool(lambda: encoding.encode(body, coding))
        return Response(body, media_type=f"application/{'json' if length is None else 'octet-stream'}", headers=headers)

    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": _infer_schema()}}}}
    binary: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/octet-stream": {}}, "description": "Tensors, in JSON or binary"}
    }
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        more = " of a version" if "version" in base else ""
        app.get(base, summary=f"Model metadata{more}", responses=error_answers(401, 404, 503))(described)
        app.get(f"{base}/config", summary=f"Configuration{more}", responses=error_answers(401, 404, 503))(config)
        app.get(f"{base}/stats", summary=f"Statistics{more}", responses=error_answers(401, 404))(statistics)
        app.get(f"{base}/ready", summary=f"Readiness{more}", responses=error_answers(401, 404, 503))(is_ready)
        app.post(
            f"{base}/infer",
            summary=f"Infer{more}",
            openapi_extra=body,
            responses={**binary, **error_answers(400, 401, 404, 408, 409, 413, 415, 429, 503)},
        )(infer)


def add_repository(app: FastAPI, service: Service) -> None:
    """The list of models, and loading one again."""
    models = service.models

    @app.post("/v2/repository/index", summary="The models and their state", responses={**error_answers(401)})
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
        responses=error_answers(400, 401, 403, 404),
    )
    async def load(name: str) -> dict[str, str]:
        """The old one serves until the new one is warm. Only with `--allow-reload`; nothing in the body is looked
        at: the file is the one that the server was started with."""
        if not service.settings.allow_reload:
            raise RefusalError(403, "reloading is not allowed here: compress serve --allow-reload, or SIGHUP")
        await models.reload(name)
        return {"name": name, "state": "READY"}


def _infer_schema() -> dict[str, Any]:
    """JSON schema of a request to infer, for the OpenAPI document."""
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
    output = {"type": "object", "required": ["name"], "properties": {"name": {"enum": list(protocol.OUTPUTS)}}}
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object", "properties": {"timeout": {"type": "integer", "minimum": 0}}},
            "inputs": {"type": "array", "items": tensor, "minItems": 1, "maxItems": 1},
            "outputs": {"type": "array", "items": output, "maxItems": len(protocol.OUTPUTS)},
        },
        "additionalProperties": False,
    }


def _statistics(service: Service, names: Sequence[str]) -> dict[str, Any]:
    known = service.metrics.statistics
    return {"model_stats": [known[name].to_dict(name, protocol.VERSION) for name in names]}


def _known(models: Models, name: str, version: str) -> None:
    models.is_ready(name)  # RefusalError 404
    if version != protocol.VERSION:
        raise RefusalError(404, f"no such version; there is: {protocol.VERSION}")
