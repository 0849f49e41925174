r"""Where a response says its final answer: in its last `\boxed`, else after "answer is", else at its end.

A response may correct itself, so the last box counts; a list of guesses is no answer.
"""

import re
from itertools import pairwise

from learner.environments.rewards.math_notation import is_unit

BOXED_CHARACTERS = 20_000
"""How much of a box is read: one that does not end within it has no end."""
JOINED_BOXES = 20
SEARCHED_CHARACTERS = 5_000
"""How much of a response without a box is read, from its end."""

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_TOKEN = re.compile(r"[-+]?[\d.,]*\d|\\?[A-Za-z](?![A-Za-z])")
_JOIN = re.compile(r"[\s$]*(?:,|;|(?:,\s*)?(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)[\s$]*")
_MARKED = re.compile(r"^\s*####\s*(.+)$", re.MULTILINE)
_ANSWER = re.compile(r"\banswer\b[^\n:=]{0,60}?(?:\bis\b\s*:?|:|=)(?=[^\n]*\w)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_STATEMENT = re.compile(r"(?:\b(?:is|are|be|equals|equal to|was|gives|get|obtain)\b\s*:?|:(?!\d)|(?<![<>!\\])=)")
_MATHEMATICS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)(?:\s*/\s*\d+|\s+\d+/\d+)?(?:\s*\\?%)?(?![\w^])")
_UNIT = re.compile(r"\s*([A-Za-z]+(?:/[A-Za-z]+|\s+per\s+[A-Za-z]+)?)")
_NO_MORE = re.compile(r"\s*(?:$|[*(]|[.!?;:](?:\s|$)|,?\s+(?:of|in|on|at|to|for|as|by|since|because|so|which)\b)")
_BARE = re.compile(r"[\s\d.,;/$*+-]*\d[\s\d.,;/$*+-]*")


def final_answers(response: str) -> list[str]:
    """What the response may mean by its final answer; empty if it gives none.

    More than one only if the last of several boxes that a comma, "and" or "or" joins: that box, and all of them.
    """
    boxes = list(_BOX.finditer(response))
    if boxes:
        return _boxed(response, boxes)
    found = _said(response[-SEARCHED_CHARACTERS:])
    return [found] if found else []


def reference_answer(reference: str) -> str:
    """The answer in a data set's reference: its last box, or what follows the last `####`, or all of it."""
    boxes = list(_BOX.finditer(reference))
    if boxes:
        return (_boxed(reference, boxes) or [""])[-1]
    marked = _MARKED.findall(reference)
    return str(marked[-1]) if marked else reference


def _boxed(text: str, boxes: list[re.Match[str]]) -> list[str]:
    contents: list[str] = []
    begin = len(text)
    for box in reversed(boxes[-JOINED_BOXES:]):
        content, end = _content(text, box.end())
        if content is None:
            # What is being corrected is not the answer, and what corrects it was cut off.
            break
        if contents and not _JOIN.fullmatch(text, end, begin):
            break
        if content.strip():
            contents.append(content)
            begin = box.start()
    return contents if len(contents) < 2 else [contents[0], ",".join(reversed(contents))]


def _content(text: str, start: int) -> tuple[str | None, int]:
    """What a box holds, and where it ends: None if it has no end; empty if the command is only mentioned."""
    if not text.startswith("{", start):
        token = _TOKEN.match(text, start)
        return (token[0], token.end()) if token else ("", start)
    depth, place, last = 0, start, min(len(text), start + BOXED_CHARACTERS)
    while place < last:
        character = text[place]
        if character == "\\":
            place += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : place], place + 1
        place += 1
    return None, last


def _said(text: str) -> str | None:
    """The answer of a response without a box."""
    marked = _MARKED.findall(text)
    if marked:
        return _value(marked[-1])
    answers = list(_ANSWER.finditer(text))
    if answers:
        return _value(text[answers[-1].end() :].split("\n", 1)[0])
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or (len(lines) > 1 and _BARE.fullmatch(lines[-1]) and _BARE.fullmatch(lines[-2])):
        return None
    sentences = [part for part in _SENTENCE_END.split(lines[-1]) if any(c.isdigit() or c == "$" for c in part)]
    last = sentences[-1] if sentences else lines[-1]
    whole = _MATHEMATICS.fullmatch(last.strip(" *."))
    return _value(last) if whole else _value(_STATEMENT.split(last)[-1])


def _value(text: str) -> str | None:
    """The one value that a piece of text gives; None if it gives several or none."""
    text = text.strip().strip("*_`\"'").strip()
    spans = list(_MATHEMATICS.finditer(text))
    if spans:
        first, joined = spans[0], [_inside(spans[0])]
        for before, span in pairwise(spans):
            if not _JOIN.fullmatch(text, before.end(), span.start()):
                break
            joined.append(_inside(span))
        # Other mathematics may follow the answer ("since ..."), but not come before it.
        alone = len(joined) == len(spans)
        return ",".join(joined) if alone or not text[: first.start()].strip(" *") else None
    number = _NUMBER.match(text)
    if number is None:
        return text.rstrip(" .!*") or None
    rest = text[number.end() :]
    unit = _UNIT.match(rest)
    if unit and is_unit(unit[1]):
        return number[0] + " " + unit[1]
    return number[0] if _NO_MORE.match(rest) else text.rstrip(" .!*")


def _inside(span: re.Match[str]) -> str:
    return next(group for group in span.groups() if group is not None)
