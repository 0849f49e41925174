"""Values and exceptions of user code in one line of text, whatever their own methods do."""

import site
import sysconfig
import traceback
from typing import Any

SHOWN_CHARACTERS = 80
MESSAGE_CHARACTERS = 1000


def shown(value: Any) -> str:
    """The beginning of a value's `repr`."""
    try:
        text = repr(value)
    except BaseException as error:
        return f"a {kind(value)} whose repr raises {kind(error)}"
    return printable(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


def described(error: BaseException) -> str:
    """An exception's kind and message, and the innermost line of the user's own code that it came through."""
    try:
        message = str(error)
    except BaseException as second:
        message = f"(its message raises {kind(second)})"
    text = f"{kind(error)}: {message[:MESSAGE_CHARACTERS]}".removesuffix(": ")
    return printable(text + _place(error))


def printable(text: str) -> str:
    """The text without lone surrogates, which no file and no terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def kind(value: Any) -> str:
    """The name of its class."""
    return type(value).__name__


def _place(error: BaseException) -> str:
    libraries = (*site.getsitepackages(), sysconfig.get_path("stdlib"), "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(libraries)]
    # The first frame is the one that catches it.
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
