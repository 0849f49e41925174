"""Writes the list of modules in docs/architecture.md from their docstrings (`make docs`).

A line a module: its name and the first sentence of its docstring. With `--check` it writes nothing, and its exit status
is 1 if the list is not what the code says.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("common", "rollout_server", "learner")
BEGIN, END = "<!-- modules: written by `make docs` -->\n", "<!-- end of modules -->\n"


def module_list() -> str:
    """The modules of all packages as Markdown, a table a folder."""
    parts = []
    for package in PACKAGES:
        for folder in sorted({path.parent for path in (ROOT / package).rglob("*.py")}):
            name = folder.relative_to(ROOT).as_posix()
            files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
            about = _docstring(folder / "__init__.py")
            lines = [f"| `{path.stem}` | {_first_sentence(path)} |" for path in files]
            table = ["| module | |", "|---|---|", *lines] if lines else []
            parts.append("\n".join([f"### `{name}/`", "", about, "", *table]).rstrip() + "\n")
    return "\n".join(parts)


def page_with(modules: str, page: str) -> str:
    """`page` with its list replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + modules + "\n" + END + after


def _docstring(path: Path) -> str:
    found = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else None
    if not found:
        raise SystemExit(f"{path.relative_to(ROOT)} has no docstring")
    return " ".join(found.split())


def _first_sentence(path: Path) -> str:
    paragraph = _docstring(path)
    for place, letter in enumerate(paragraph):
        if (
            letter == "."
            and paragraph[place + 1 : place + 2] in ("", " ")
            and not paragraph[:place].endswith(("eq", "e.g"))
        ):
            return paragraph[: place + 1].replace("|", "\\|")
    return paragraph.replace("|", "\\|")


def main() -> int:
    page = PAGE.read_text()
    written = page_with(module_list(), page)
    if "--check" in sys.argv[1:]:
        if written != page:
            print("docs/architecture.md does not list the modules as they are: run `make docs`", file=sys.stderr)
        return int(written != page)
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
