"""schemathesis over the OpenAPI schemas of both listeners: no 5xx, and every answer is what the schema says."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.http_server import ServerProcess

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 25
BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def made_answerable(body: Any, model: str) -> Any:
    """What is generated names models that are not served and asks for long answers: keep the rest of it."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = model
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 8:
                body[name] = 8
        if isinstance(body.get("n"), int) and body["n"] > 4:
            body["n"] = 2
    return body


def check_routes(schema_text: Any, url: str, model: str, without: tuple[str, ...] = ()) -> int:
    """Call every operation with requests from its schema, valid and not; how many operations there were."""
    schema = schemathesis.openapi.from_dict(schema_text)
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in without:
            continue
        count += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                case.body = made_answerable(case.body, model)
                case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)

            check()
    return count


def operations(schema: Any) -> int:
    return sum(map(len, schema["paths"].values()))


def test_public_routes(server: ServerProcess) -> None:
    schema = server.client.get("/openapi.json").json()
    assert check_routes(schema, server.url, server.model) == operations(schema)


def test_admin_routes(server: ServerProcess) -> None:
    """Without `/pause`, which would stop the server for the other tests."""
    schema = server.admin_client.get("/openapi.json").json()
    assert check_routes(schema, server.admin, server.model, without=("/pause",)) == operations(schema) - 1
