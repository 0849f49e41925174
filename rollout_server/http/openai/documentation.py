"""`GET /docs`: FastAPI's page, with what its browser part needs taken from vLLM where that has it."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def _directory() -> Path | None:
    """Where vLLM keeps Swagger UI for its own page; None if this version has it not."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent / "entrypoints/serve/instrumentator/static"
    return directory if all((directory / name).is_file() for name in FILES) else None


def add_documentation(app: FastAPI) -> None:
    """Add `/docs`. Without vLLM's copy of Swagger UI the page takes it from the internet."""
    directory = _directory()
    urls: dict[str, Any] = {}
    if directory is not None:
        urls = {"swagger_js_url": "docs/swagger-ui-bundle.js", "swagger_css_url": "docs/swagger-ui.css"}
        for name, media_type in FILES.items():
            _add_file(app, directory / name, media_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(openapi_url="openapi.json", title=app.title, swagger_favicon_url="data:,", **urls)
        if directory is not None:
            return page
        note = b"<p>This page needs the internet for Swagger UI; <a href=openapi.json>the schema</a> does not.</p>"
        return HTMLResponse(bytes(page.body).replace(b"<body>", b"<body>" + note))


def _add_file(app: FastAPI, path: Path, media_type: str) -> None:
    @app.get(f"/docs/{path.name}", include_in_schema=False)
    def file() -> Response:
        return Response(path.read_bytes(), media_type=media_type)
