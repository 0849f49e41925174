"""Run the benchmarks and write `runs/bench/latest.json`: `python -m tests.benchmarks.run [--only NAME ...]`."""

import argparse
import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import tests.conftest  # noqa: F401  (quiet CPU settings, before vLLM is imported)
from tests.benchmarks.report import Finding, show_findings, write_findings

LATEST = Path("runs/bench/latest.json")


def _engine(directory: Path) -> list[Finding]:
    from tests.benchmarks.engine import measure_engine

    return asyncio.run(measure_engine(directory))


def _training(directory: Path) -> list[Finding]:
    from tests.benchmarks.training import measure_training

    return measure_training(directory)


def _http(directory: Path) -> list[Finding]:
    from tests.benchmarks.http import measure_http

    return measure_http(directory)


def _data_path(directory: Path) -> list[Finding]:
    from tests.benchmarks.data_path import measure_data_path

    return measure_data_path(directory)


def _weights(directory: Path) -> list[Finding]:
    from tests.benchmarks.weights import measure_weights

    return measure_weights(directory)


def _asynchronous(directory: Path) -> list[Finding]:
    from tests.benchmarks.asynchronous import measure_asynchronous

    return measure_asynchronous(directory)


def _accuracy(directory: Path) -> list[Finding]:
    from tests.benchmarks.asynchronous import measure_accuracy

    return measure_accuracy(directory)


BENCHMARKS: dict[str, Callable[[Path], list[Finding]]] = {
    "engine": _engine,
    "training": _training,
    "http": _http,
    "data_path": _data_path,
    "weights": _weights,
    "asynchronous": _asynchronous,
    "accuracy": _accuracy,
}
LONG = {"accuracy"}
"""Only measured when asked for: about half an hour."""


def main() -> int:
    """Run what is asked for; the exit status is 0 whether or not the targets hold, as the table says which do."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.run", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHMARKS),
        default=[name for name in BENCHMARKS if name not in LONG],
        metavar="NAME",
    )
    parser.add_argument("--output", type=Path, default=LATEST, help=f"where to write the findings (default {LATEST})")
    options = parser.parse_args()
    findings: list[Finding] = []
    for name in options.only:
        Console(stderr=True).print(f"measuring: {name}")
        with tempfile.TemporaryDirectory(prefix="e3rl-bench-") as directory:
            findings += BENCHMARKS[name](Path(directory))
        write_findings(findings, options.output)
    show_findings(findings)
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
