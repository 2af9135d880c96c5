"""The web application: routes for pictures (`detect`), for tensors (`tensors`), probes, metrics and the web page."""

from __future__ import annotations

import mimetypes
from importlib import metadata, resources

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from deploy.serve.batching import InferenceError
from deploy.serve.bodies import ClientGoneError
from deploy.serve.cameras import add_deepstack, add_doods
from deploy.serve.detect import add_detection, add_models
from deploy.serve.middleware import refusal_body, refusal_headers
from deploy.serve.service import Service, error_answers, json_answer
from deploy.serve.settings import RefusalError
from deploy.serve.tensors import add_inference, add_repository, add_server

_DESCRIPTION = """Detects objects in pictures. Pictures go to `/v1/detect`; clients of the Open Inference Protocol
(KServe, Triton) find it under `/v2`. Every answer carries `X-Request-Id`."""


def create_app(service: Service) -> FastAPI:
    """The application; `deploy.serve.middleware.Middleware` belongs around it."""
    app = FastAPI(
        title="compress serve",
        description=_DESCRIPTION,
        version=metadata.version("compress-detectors"),
        docs_url=None,  # FastAPI's own pages load scripts from the internet
        redoc_url=None,
    )
    _add_errors(app)
    add_detection(app, service)
    add_models(app, service)
    add_deepstack(app, service)
    add_doods(app, service)
    _add_probes(app, service)
    add_server(app, service)
    add_inference(app, service)
    add_repository(app, service)
    _add_page(app)
    return app


# ----------------------------------------------------------------------------------------------------


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="The process is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="All models take requests", responses={503: {"description": "Not yet, or no more"}})
    async def readyz() -> Response:
        """Answer whether the server is ready, with what really runs each model."""
        rows = []
        for name in service.models.names:
            warm = service.models.is_ready(name)
            rows.append({
                "name": name,
                "ready": warm,
                "backend": service.models.get(name).runner.backend if warm else None,
            })  # fmt: skip
        answer = {"ready": service.ready, "draining": service.draining, "models": rows}
        return json_answer(answer, 200 if service.ready else 503)

    @app.get("/metrics", summary="For Prometheus", response_class=PlainTextResponse, responses={**error_answers(401)})
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
        return Response(status_code=499)  # for the log: the client is gone

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:  # it goes on to the middleware, which logs it
        return answer(request, RefusalError(500, "internal error; the log has more under this request id"))
