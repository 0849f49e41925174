"""Log lines on standard error, as text or JSON. Keys, prompts and responses are never logged.

Some of what is logged is as a client sent it: no line can be forged with it, and no terminal be given orders.
"""

import json
import logging
import re
import sys
import time
from typing import Any, TextIO

FIELDS = "fields"
"""The attribute of a log record that holds further fields: `extra={FIELDS: {...}}`."""


_PLAIN = re.compile(r"[\w.:/+-]+", re.ASCII)


def printable(text: str) -> str:
    """`text` on one line, with escapes for what is not printable: control characters, line ends, marks of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _quoted(value: Any) -> str:
    """A field's value, in quotes unless it is a plain word."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, default=str).replace("\x7f", "\\u007f")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json(line)


class TextFormatter(logging.Formatter):
    """Time, level, message, then `name=value` for each field. An exception's lines follow, each indented."""

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record)
        parts = [f"{time} {record.levelname} {record.name}: {printable(record.getMessage())}"]
        parts += [f"{name}={_quoted(value)}" for name, value in getattr(record, FIELDS, {}).items()]
        lines = [" ".join(parts)]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        if record.stack_info:
            lines += self.formatStack(record.stack_info).splitlines()
        return "\n    ".join(map(printable, lines))


def configure(form: str, level: str, stream: TextIO | None = None) -> None:
    """Send the server's log lines, and warnings of the libraries, to `stream` (standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    formatter = JsonFormatter() if form == "json" else TextFormatter()
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("e3rl").setLevel(level.upper())
