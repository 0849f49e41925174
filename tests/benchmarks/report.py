"""What a benchmark finds, and how it is shown and kept."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Finding:
    """A ratio (or another figure) and its target. `at_least` false: the figure must not exceed the target."""

    name: str
    ratio: float
    target: float
    detail: str
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def write_findings(findings: Sequence[Finding], path: Path) -> None:
    """Write `path`: a list of objects `name`, `ratio`, `target`, `holds`, `detail`."""
    rows = [{k: v for k, v in asdict(f).items() if k != "at_least"} | {"holds": f.holds} for f in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def show_findings(findings: Sequence[Finding]) -> None:
    """Print a table."""
    table = Table(title="Benchmarks (ratios in one run)")
    for column in ("name", "measured", "target", "holds", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        bound = ">=" if finding.at_least else "<="
        table.add_row(
            finding.name,
            f"{finding.ratio:.3f}",
            f"{bound} {finding.target:g}",
            "yes" if finding.holds else "[bold red]no[/]",
            finding.detail,
        )
    Console(width=150).print(table)
