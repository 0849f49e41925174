"""Errors as OpenAI's clients expect them, for every way in which a request can fail."""

import re
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_UNION_MEMBER = re.compile(r"^(str|int|float|bool|constrained-\w+|[\w-]*\[.*)$")
"""Parts of a pydantic location that name a member of a union and not a place in the request. Those of tagged unions
stand below the name in `_TAGGED`."""
_TAGGED = frozenset({"segmentation", "response_format"})


class ApiError(Exception):
    """A request that is answered with an error; `message` is for the client and holds no path, key or stack trace."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """503: the client may try again soon."""
    return ApiError(503, message, code="no_replica", headers={"Retry-After": "1"})


def of_status(status: int) -> ApiError:
    """The error for a status that the framework produced itself."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Error"
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    messages = {404: "there is no such route", 405: "this route does not take this method"}
    return ApiError(status, messages.get(status, phrase), code=codes.get(status))


def from_validation(error: ValidationError, prefix: tuple[str, ...] = ()) -> ApiError:
    """A 400 that names the place of the first problem and says what all of them are."""
    problems = error.errors(include_input=False, include_url=False)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    places: dict[str, list[str]] = {}
    for problem in unknown or problems:
        place = parameter((*prefix, *problem["loc"]), is_key=problem["type"] == "extra_forbidden")
        explanations = places.setdefault(place, [])
        if _explain(problem) not in explanations:
            explanations.append(_explain(problem))
    lines = [f"{place}: {' or '.join(texts)}" if place else texts[0] for place, texts in places.items()]
    first = (unknown or problems)[0]
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter", "json_invalid": "invalid_json"}
    more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
    return ApiError(
        400,
        "; ".join(lines[:5]) + more,
        param=next(iter(places)) or None,
        code=code.get(first["type"], "invalid_value"),
    )


def parameter(location: tuple[int | str, ...], is_key: bool = False) -> str:
    """A pydantic location as clients write it: `messages[0].content`. `is_key`: its last part is a key for certain."""
    text = ""
    for place, part in enumerate(location):
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        is_tag = place > 0 and location[place - 1] in _TAGGED and place + 1 < len(location)
        if (is_key and place + 1 == len(location)) or not (is_tag or _UNION_MEMBER.match(part)):
            text += f".{part}" if text else part or '""'
    return text[:200]


def _explain(problem: Any) -> str:
    kind, message = problem["type"], str(problem["msg"])
    if kind == "extra_forbidden":
        return "unknown parameter"
    if kind == "missing":
        return "is required"
    if kind == "json_invalid":
        return "the body is not valid JSON: " + message.removeprefix("Invalid JSON: ")
    if kind == "model_type" or kind == "model_attributes_type":
        return "Input should be a JSON object"
    return message.removeprefix("Value error, ")
