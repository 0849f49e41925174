"""What FastAPI's schema lacks because bodies are not read by it: request bodies, errors, keys."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rollout_server.http.openai.schema.service import ErrorAnswer

REFERENCE = "#/components/schemas/{model}"
_EXPLANATIONS = {
    400: "A value is wrong, a parameter unknown, or the prompt too long: `param` names it.",
    401: "No valid API key.",
    403: "Without an API key: `Host` or `Origin` is not this machine's.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    409: "The version is not newer than what has been served.",
    413: "The body is too long.",
    415: "The body is not `application/json`, or compressed.",
    429: "Too many requests wait; `Retry-After` says when to try again.",
    431: "The headers are too long.",
    500: "An error of the server.",
    503: "No replica is ready.",
    504: "The request's deadline passed.",
}
EVERYWHERE = (401, 403, 408, 413, 415, 431, 500)

Models = Sequence[type[BaseModel]]


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `model`."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these errors and those that every route may answer with."""
    return {
        status: {"model": ErrorAnswer, "description": _EXPLANATIONS[status]}
        for status in sorted({*EVERYWHERE, *statuses})
    }


def streamed(media_type: str, model: type[BaseModel], text: str) -> dict[str, Any]:
    """The description of status 200 of a route that can stream `model`s: lines, or the data of server-sent events."""
    schema = {"type": "string", "description": text, "x-each": {"$ref": REFERENCE.format(model=model.__name__)}}
    if media_type == "text/event-stream":
        # What is described of such a stream is one event.
        event = {"event": {"const": "message"}, "data": schema}
        schema = {"type": "object", "properties": event, "required": ["data"]}
    return {"content": {media_type: {"schema": schema}}}


class DescribedApp(FastAPI):
    """An app with a complete OpenAPI schema. `bodies`: the models of requests; `streams`: those of streams' parts."""

    def __init__(self, *, bodies: Models, streams: Models, needs_key: bool, **options: Any) -> None:
        super().__init__(**options)
        self._modes: list[Any] = [(model, "validation") for model in bodies]
        self._modes += [(model, "serialization") for model in streams]
        self._needs_key = needs_key

    def openapi(self) -> dict[str, Any]:
        """The schema, made at the first call."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        result = super().openapi()
        components = result.setdefault("components", {}).setdefault("schemas", {})
        _, definitions = models_json_schema(self._modes, ref_template=REFERENCE)
        components.update(definitions.get("$defs", {}))
        for operations in result["paths"].values():
            for operation in operations.values():
                # FastAPI's, of routes with parameters; errors are 400 here.
                operation["responses"].pop("422", None)
        if self._needs_key:
            result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in result["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path == "/health" else [{"key": []}]
        return result
