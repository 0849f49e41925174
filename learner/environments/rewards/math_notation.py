r"""One notation for mathematical answers: LaTeX that `math-verify` reads, from Unicode, plain text and variants."""

import re
import unicodedata

from learner.environments.rewards.math_symbols import LOWERED, MATH_WORDS, RAISED, SIGNS, SYMBOLS, UNITS

_THOUSANDS = re.compile(r"(?<![\d.])[1-9]\d{0,2}(?:(?:,?\\[,; !:]|\{,\}|[’'\u00a0\u202f~])\d{3})+(?!\d)")
_SPACED_THOUSANDS = re.compile(r"([-+]?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?)(?=$|[^\d ]| [^\d])")
_MIXED = re.compile(r"(?<![\w.}])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\w)")
_FRACTION_SIGN = re.compile(r"(\d*)([¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w)")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)(?!\d)")
_PLAIN_COMMAND = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|ln|log|exp|infty)(?![A-Za-z])")
_ROOT = re.compile(r"\\sqrt((?:\[3\])?)\s*(?:\(([^()]*)\)|(\d+|[A-Za-z](?![A-Za-z])))")
_LAST_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}\s*(?:\^\s*\{?([23])\}?)?$")
_LAST_WORDS = re.compile(
    r"(?<=[\d)}\s])(?<!\\)([A-Za-z]+(?:\s*/\s*[A-Za-z]+|(?:\s+[A-Za-z]+)*))\s*(?:\^\s*\{?([23])\}?)?$"
)
_REVERSED = re.compile(r"([-+]?[\d./]+)\s*=\s*([A-Za-z])")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textrm|mbox|textbf|mathbf|operatorname)\s*\{([^{}]*)\}")
_COMMANDS = re.compile(r"\\(?:displaystyle|textstyle|left|right|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\s+")


def latex(text: str) -> tuple[str, str]:
    """The answer as LaTeX without its unit, and the unit's name: empty without one, "?" if `UNITS` lacks it."""
    text = _unwrapped(_ascii(text))
    text, sign = _without_currency(text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _SPACES.sub(" ", text).strip()
    text, unit = _without_unit(text)
    spaced = _SPACED_THOUSANDS.fullmatch(text)
    if spaced:
        text = text.replace(" ", "")
    text = _PLAIN_COMMAND.sub(r"\\\1", text.replace("\\varnothing", "\\emptyset"))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{m[1]}{{{m[2] if m[2] is not None else m[3]}}}", text)
    swapped = _REVERSED.fullmatch(text)
    if swapped:
        text = f"{swapped[2]}={swapped[1]}"
    return text, sign or unit


def words(text: str) -> str:
    """What of an answer is compared as text: without markup and spaces; of words the case does not count."""
    text = _WRAPPED.sub(r"\1", _COMMANDS.sub("", _unwrapped(_ascii(text))))
    text = re.sub(r"(?<!\d) | (?!\d)", "", _SPACES.sub(" ", text))
    choice = re.fullmatch(r"\(?([A-Z])\)?[.:]?", text)
    if choice:
        return choice[1]
    return text.casefold() if re.fullmatch(r"[A-Za-z'-]{2,}", text) else text


def _ascii(text: str) -> str:
    """Unicode's mathematics as LaTeX, its other forms of letters and digits as the plain ones."""
    text = _FRACTION_SIGN.sub(_fraction, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(RAISED) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(LOWERED) + "}", text)
    text = "".join(SYMBOLS.get(character, character) for character in text)
    return unicodedata.normalize("NFKC", text)


def _fraction(match: re.Match[str]) -> str:
    above, below = unicodedata.normalize("NFKC", match[2]).split("\N{FRACTION SLASH}")
    return rf"{match[1]}\frac{{{above}}}{{{below}}}"


def _unwrapped(text: str) -> str:
    """Without what encloses the whole answer: dollars, `\\(`, `\\[`, asterisks; and without a full stop at its end."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*`").rstrip(".,;").strip()
        text = re.sub(r"^(?:\$\$?|\\\(|\\\[)(.*?)(?:(?<!\\)\$\$?|\\\)|\\\])$", r"\1", text, flags=re.DOTALL)
    return _COMMANDS.sub("", text)


def _without_currency(text: str) -> tuple[str, str]:
    match = re.match(r"([-+]?)\s*\\?([$€£¥₹])\s*(?=[\d.])", text)
    return (match[1] + text[match.end() :], SIGNS[match[2]]) if match else (text, "")


def _without_unit(text: str) -> tuple[str, str]:
    r"""The value and its unit: `\text{...}` after a value, words after a number, `^\circ`."""
    percent = re.fullmatch(r"(.*[\d)}])\s*\\?%", text)
    if percent:
        return percent[1], "%"
    degrees = re.fullmatch(r"(.*[\d)}])\s*\^\s*\{?\s*\\circ\s*\}?\s*([CF]?)", text)
    if degrees:
        return degrees[1], "degree" + degrees[2]
    found = _LAST_TEXT.search(text) or _LAST_WORDS.search(text)
    if found is None or not found.start():
        return text, ""
    value, name = text[: found.start()].rstrip(), " ".join(found[1].replace("/", " / ").split()).replace(" / ", "/")
    if not re.search(r"[\d)}]$", value) or re.search(r"\\(?:log|sin|cos|tan|ln)\S*$", value):
        return text, ""
    if found.re is _LAST_WORDS and not is_unit(name):
        return text, ""
    known = _known_unit(name)
    if len(name) == 1 and not re.search(r"\s$", text[: found.start(1)]) and found.re is _LAST_WORDS:
        return text, ""
    return value, (known or "?") + (found[2] or "")


def is_unit(name: str) -> bool:
    """Whether words after a number are what is counted or measured, and not mathematics: letters are variables."""
    parts = re.split(r"[\s/]+", name)
    if any(part.lower() in MATH_WORDS for part in parts):
        return False
    return _known_unit(name) is not None or all(len(part) > 2 or part in UNITS for part in parts)


def _known_unit(name: str) -> str | None:
    return UNITS.get(name) or UNITS.get(name.lower() if len(name) > 2 else name)
