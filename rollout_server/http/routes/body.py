"""Bodies of requests: a look at their structure, which is cheap and lets other requests go on, then their models.

A parser makes an object for whatever a body names, and a validator an error for whatever is wrong, in one call that
nothing can interrupt: a body of 4 MiB can name a million objects. So bodies are counted first.
"""

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from common.slices import Slices
from rollout_server.http.openai.errors import ApiError, bad_request, from_validation, parameter

MAX_ITEMS = 50_000
"""Objects, lists, keys and texts of a body, together."""
MAX_NUMBERS = 500_000
MAX_KEYS = 1024
"""Keys of one object."""
MAX_DEPTH = 64
LONG_BODY = 64 * 1024
_ITEMS_BETWEEN_LOOKS = 500
_TOKEN = re.compile(rb'[^"\[\]{}]*+(?:("[^"\\]*+(?:\\.[^"\\]*+)*+")(\s*+:)?|([\[\]{}])|"|\Z)', re.DOTALL)
"""What comes next, and what is skipped before it. Neither a text nor a bracket: the end, or a text without one. It
matches everywhere: where it did not, the next try would begin one byte further on."""

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The request's JSON body.

    Raises:
        ApiError: 400 that names the place of the problem.
    """
    body = await request.body() or b"{}"
    await check_structure(body)
    if len(body) > LONG_BODY:
        await asyncio.sleep(0)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


@dataclass(slots=True)
class _Frame:
    """An object or a list that is open. `keys`: those of an object so far. `at`: the last key, or null."""

    keys: set[bytes] | None
    at: str | None = None


@dataclass(slots=True)
class _Structure:
    items: int = 0
    commas_in_texts: int = 0
    frames: list[_Frame] = field(default_factory=list)

    def take(self, text: bytes | None, is_key: bool, bracket: bytes | None) -> None:
        """The next text, key or bracket. What is not JSON at all is left to the parser."""
        if bracket in (b"}", b"]"):
            if self.frames:
                self.frames.pop()
            return
        self.items += 1
        if self.items > MAX_ITEMS:
            raise _too_complex(f"more than {MAX_ITEMS} objects, lists, keys and texts")
        if bracket is not None:
            self.frames.append(_Frame(set() if bracket == b"{" else None))
            if len(self.frames) > MAX_DEPTH:
                raise _too_complex(f"objects and lists inside each other, more than {MAX_DEPTH} deep")
        elif is_key and text is not None and self.frames and self.frames[-1].keys is not None:
            self._key(text, self.frames[-1], self.frames[-1].keys)

    def _key(self, text: bytes, frame: _Frame, keys: set[bytes]) -> None:
        name = _decoded(text)
        # Equal names have equal bytes, which the names themselves have not always: a lone surrogate is no character.
        key = name.encode("utf-8", "surrogatepass")
        frame.at = name
        if key in keys:
            place = parameter(tuple(f.at for f in self.frames if f.at is not None), is_key=True)
            raise bad_request(f"{place}: the key is given twice", place, "duplicate_key")
        keys.add(key)
        if len(keys) > MAX_KEYS:
            raise _too_complex(f"an object with more than {MAX_KEYS} keys")


async def check_structure(body: bytes) -> None:
    """Refuse bodies with too much in them, and with a key twice in one object, in slices.

    Raises:
        ApiError: 400.
    """
    slices = Slices()
    structure = _Structure()
    many_commas = body.count(b",") >= MAX_NUMBERS
    for number, match in enumerate(_TOKEN.finditer(body)):
        text, colon, bracket = match.groups()
        if text is bracket is None:
            break
        structure.take(text, colon is not None, bracket)
        if many_commas and text is not None:
            structure.commas_in_texts += text.count(b",")
        if number % _ITEMS_BETWEEN_LOOKS == 0:
            await slices.turn()
    if many_commas and body.count(b",") - structure.commas_in_texts >= MAX_NUMBERS + structure.items:
        raise _too_complex(f"more than {MAX_NUMBERS} numbers")


def _decoded(text: bytes) -> str:
    if b"\\" not in text:
        return text[1:-1].decode("utf-8", "replace")
    try:
        return str(json.loads(text))
    except ValueError:
        return repr(text)


def _too_complex(what: str) -> ApiError:
    return bad_request(f"the body has {what}", code="body_too_complex")
