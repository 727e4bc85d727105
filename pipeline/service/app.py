"""The HTTP interface: routes, limits on what comes in, answers, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pipeline.service.core import DecoderService
from pipeline.service.datasets import Query as SampleQuery
from pipeline.service.docs_page import DOCS_CSP, render_docs
from pipeline.service.edge import Edge, client_headers
from pipeline.service.errors import RequestError
from pipeline.service.gate import SESSION_COOKIE, SESSION_S
from pipeline.service.parameters import DecodeParameters, VideoParameters, describe_problems

_VIEWER = Path(__file__).parent / "viewer"
_VIEWER_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"example": {"error": {"reason": "…", "detail": "…"}}}}}
    for code, text in {
        401: "No token, or another one.",
        404: "There is none of this name.",
        408: "Not whole within the deadline.",
        413: "Larger than the service allows.",
        422: "What is wrong with the request.",
        429: "The queue is full; Retry-After says when to come again.",
    }.items()
}
_VIDEO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The video.",
        "content": {"video/mp4": {}, "video/x-matroska": {}, "image/webp": {}, "application/zip": {}},
    },
    **_ERRORS,
}


class PageParameters(BaseModel):
    """Which samples, and which page of them."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    offset: int = Field(default=0, ge=0, le=10**12)
    """Samples to pass over."""
    limit: int = Field(default=50, ge=1, le=500)
    """Samples of one page."""
    bucket: str | None = Field(default=None, max_length=100)
    """Only of this bucket, such as 49x480x720@8."""
    caption: str | None = Field(default=None, max_length=1000)
    """Only where the caption contains this text."""
    filter: list[Annotated[str, Field(max_length=1000)]] = Field(default_factory=list, max_length=20)
    """Conditions such as psnr>30 or caption~dog; all must hold."""


def build_app(service: DecoderService) -> FastAPI:
    """The application over one replica's service."""
    app = FastAPI(
        title="CogVideoX latents",
        summary="Decodes latents to video on request, and shows latent datasets.",
        version="1",
        docs_url=None,  # these load scripts from elsewhere; /docs is our own page
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(app, service)
    _add_decoding(app, service)
    _add_datasets(app, service)
    _add_operations(app, service)
    _add_pages(app)
    app.add_middleware(Edge, service=service)
    return app


def _add_decoding(app: FastAPI, service: DecoderService) -> None:
    body = {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

    @app.post("/v1/decode", tags=["decode"], response_class=Response, responses=_VIDEO, openapi_extra={"requestBody": body})
    async def decode(request: Request, wanted: Annotated[DecodeParameters, Query()]) -> Response:
        """Decode one latent to a video. The body is a safetensors file with the latent of one clip."""
        return await service.answer_upload(request, wanted)


def _add_datasets(app: FastAPI, service: DecoderService) -> None:
    shown = service.datasets

    @app.get("/v1/datasets", tags=["datasets"])
    async def list_datasets() -> Response:
        """The datasets of the service's configuration."""
        return JSONResponse({"datasets": await service.run(shown.describe)})

    @app.get("/v1/datasets/{name}/samples", tags=["datasets"], responses=_ERRORS)
    async def list_samples(name: str, page: Annotated[PageParameters, Query()]) -> Response:
        """One page of samples."""
        query = SampleQuery(bucket=page.bucket or None, caption=page.caption or None, filters=tuple(filter(None, page.filter)))
        dataset = shown.find(name)
        indices = await dataset.search(query)
        return JSONResponse(await service.run(lambda: dataset.list_samples(indices, page.offset, page.limit)))

    # Ids of other programs' datasets may have slashes in them.
    @app.get("/v1/datasets/{name}/samples/{sample_id:path}/video", tags=["datasets"], response_class=Response, responses=_VIDEO)
    async def sample_video(request: Request, name: str, sample_id: str, wanted: Annotated[VideoParameters, Query()]) -> Response:
        """The sample decoded. Range, If-Range and If-None-Match are answered unless stream is set."""
        return await service.answer_sample(request, name, sample_id, wanted)

    @app.get("/v1/datasets/{name}/samples/{sample_id:path}/latent", tags=["datasets"], response_class=Response, responses=_ERRORS)
    async def sample_latent(name: str, sample_id: str) -> Response:
        """The latent as safetensors: key latent, unscaled, [C, F, H, W], stored dtype."""
        return await service.answer_latent(name, sample_id)

    @app.get(
        "/v1/datasets/{name}/samples/{sample_id:path}/frame.png", tags=["datasets"], response_class=Response, responses=_ERRORS
    )
    async def sample_frame(name: str, sample_id: str) -> Response:
        """The first frame of the source, where the dataset stores it."""
        return Response(await service.run(lambda: shown.find(name).read_first_frame(sample_id)), media_type="image/png")

    @app.get("/v1/datasets/{name}/samples/{sample_id:path}", tags=["datasets"], responses=_ERRORS)
    async def show_sample(name: str, sample_id: str) -> Response:
        """All small columns of a sample."""
        return JSONResponse(await service.run(lambda: shown.find(name).show_sample(sample_id)))


def _add_operations(app: FastAPI, service: DecoderService) -> None:
    @app.get("/healthz", tags=["operations"])
    async def healthz() -> Response:
        """200 while the model answers; 503 when this replica is to be replaced."""
        return _state(service)

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Response:
        """200 when requests can be served."""
        return _state(service)

    @app.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of all replicas."""
        return PlainTextResponse(await service.collect_metrics(), media_type="text/plain; version=0.0.4")

    @app.post("/v1/session", tags=["operations"], status_code=204, responses={401: _ERRORS[401]})
    async def open_session(request: Request) -> Response:
        """Trade the bearer token for a cookie, for pages: media elements send no headers."""
        answer = Response(status_code=204)
        if service.gate.needs_token:
            service.gate.check_bearer(client_headers(request.scope).get("authorization", ""))
            is_secure = service.limits.https or request.url.scheme == "https"
            answer.set_cookie(
                SESSION_COOKIE, service.gate.open_session(), max_age=SESSION_S, httponly=True, samesite="strict", secure=is_secure
            )
        return answer


def _add_pages(app: FastAPI) -> None:
    files = {path.name: path for path in sorted(_VIEWER.glob("*")) if path.suffix in _VIEWER_TYPES}

    @app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(render_docs(app.openapi()), headers={"content-security-policy": DOCS_CSP})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.api_route("/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _file(name)

    def _file(name: str) -> Response:
        path = files.get(name)
        if path is None:
            raise RequestError(404, "no_page", f"there is no /{name[:100]}; /docs lists what there is")
        headers = {"cache-control": "no-cache"}
        return Response(path.read_bytes(), media_type=_VIEWER_TYPES[path.suffix], headers=headers)


def _add_errors(app: FastAPI, service: DecoderService) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        service.metrics.count_refused(error.reason)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(RequestError(422, "bad_parameter", describe_problems(error.errors())))

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        reason = {404: "no_page", 405: "method"}.get(error.status_code, "bad_request")
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}; /docs lists what there is"
        return error_response(RequestError(error.status_code, reason, detail))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        # The text of an error that nobody foresaw may hold what is none of the client's business.
        return error_response(RequestError(500, "internal", f"the service failed by {type(error).__name__}; its log says more"))


def error_response(error: RequestError) -> Response:
    """The error as every client is told it."""
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.to_dict(), error.status, headers)


def _state(service: DecoderService) -> Response:
    try:
        service.decoder.check_health()
    except RuntimeError as error:
        return JSONResponse({"ready": False, "error": {"reason": "ill", "detail": str(error)}}, 503)
    return JSONResponse({"ready": True})
