"""What both listeners' apps share: middleware and errors in OpenAI's shape."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rollout_server.http.openai.errors import ApiError, bad_request, of_status, parameter
from rollout_server.http.openai.openapi import DescribedApp, Models, errors
from rollout_server.http.openai.schema.service import Health
from rollout_server.http.routes.service import Service
from rollout_server.http.routes.translation import ANSWERS
from rollout_server.http.server.guards import HeadAsGet, JsonOnly, LocalOnly
from rollout_server.http.server.middleware import REQUEST_ID, Authenticate, LimitBody, Observe

VERSION = "0.1.0"


def base_app(service: Service, title: str, description: str, bodies: Models, streams: Models = ()) -> FastAPI:
    """An app with `/health`, the limits, and no way to answer an error in another shape.

    `bodies` and `streams`: see `DescribedApp`.
    """
    settings = service.settings
    app = DescribedApp(
        bodies=bodies,
        streams=streams,
        needs_key=bool(settings.api_key),
        title=title,
        version=VERSION,
        description=description,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    # Added from the inside out.
    app.add_middleware(HeadAsGet)
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(JsonOnly)
    if settings.api_key:
        app.add_middleware(Authenticate, keys=settings.api_key)
    else:
        app.add_middleware(LocalOnly)
    app.add_middleware(Observe, metrics=service.metrics, tracing=service.tracing)
    app.add_exception_handler(ApiError, _api_error)
    for kind in ANSWERS:
        app.add_exception_handler(kind, _api_error)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)

    @app.get("/health", responses=errors(), summary="Whether the process lives")
    async def health() -> Health:
        return Health(status="ok")

    return app


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _api_error(request: Request, error: Any) -> JSONResponse:
    return _answer(error if isinstance(error, ApiError) else ANSWERS[type(error)](error))


async def _framework_error(request: Request, error: Any) -> JSONResponse:
    answer = of_status(error.status_code)
    answer.headers.update(error.headers or {})
    return _answer(answer)


async def _validation_error(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    return _answer(bad_request(str(first["msg"]), parameter(tuple(first["loc"])) or None))


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    request_id = request.scope.get(REQUEST_ID, "unknown")
    text = f"internal error; the server's log has it under request id {request_id}"
    return _answer(ApiError(500, text, code="internal"))
