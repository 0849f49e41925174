"""The OpenAPI schemas of both listeners."""

import json
from typing import Any

from tests.stub_replica import erasing_server


async def test_the_openapi_schema_is_complete() -> None:
    async with erasing_server() as server:
        for app in (server.app, server.admin_app):
            schema = app.openapi()
            text = json.dumps(schema)
            for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
                assert name in schema["components"]["schemas"], name
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    assert "422" not in operation["responses"]
                    assert "401" in operation["responses"], path
                    body = operation.get("requestBody")
                    if body is not None:
                        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                        assert schema["components"]["schemas"][name]["examples"]
    _numbers_are_bounded(server.app.openapi()["components"]["schemas"])


def _numbers_are_bounded(schemas: dict[str, Any]) -> None:
    """Every number in a request has a lower and an upper bound."""
    seen: set[str] = set()

    def visit(node: Any, place: str) -> None:
        if isinstance(node, list):
            for child in node:
                visit(child, place)
        elif isinstance(node, dict):
            if "$ref" in node:
                name = node["$ref"].rpartition("/")[2]
                if name not in seen:
                    seen.add(name)
                    visit(schemas[name], name)
                return
            if node.get("type") in ("integer", "number") and "const" not in node:
                assert {"minimum", "exclusiveMinimum"} & set(node), place
                assert {"maximum", "exclusiveMaximum"} & set(node), place
            for key, child in node.items():
                if key not in ("examples", "default"):
                    visit(child, f"{place}.{key}")

    for root in ("CompletionRequest", "ChatRequest", "RolloutRequest"):
        visit({"$ref": root}, root)
