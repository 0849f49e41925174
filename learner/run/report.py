"""The end of a run in figures: `report.json`, the final table, and the comparison with the baselines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.table import Table

from common import metrics as names
from learner.evaluation.evaluate import MODES, Evaluation
from learner.run.run_directory import write_text

_SECONDS = {
    "rollout": names.ROLLOUT_SECONDS,
    "train": names.TRAIN_SECONDS,
    "sync": names.SYNC_SECONDS,
    "other": names.OTHER_SECONDS,
    "steps": names.STEP_SECONDS,
}


def build_report(
    name: str,
    preset: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    process_seconds: Mapping[str, float],
    peak_memory_gib: float,
) -> dict[str, Any]:
    """The run's report. Totals are over all steps, those of earlier processes of a resumed run included.

    `metrics`: one object a step, by the names of `common.metrics`. `process_seconds` (to `start`, and of the whole
    `process`) and `peak_memory_gib` are of the last process only.
    """
    steps = [e.step for e in evaluations]
    ends = {"before": min(steps), "after": max(steps)}
    report: dict[str, Any] = {
        f"{mode}_{end}": e.model_dump()
        for mode in MODES
        for end, step in ends.items()
        for e in evaluations
        if e.mode == mode and e.step == step
    }
    seconds = {part: _total(metrics, key) for part, key in _SECONDS.items()}
    working = seconds["rollout"] + seconds["train"]
    generated, erased = _total(metrics, names.GENERATED_TOKENS), _total(metrics, names.ERASED_TOKENS)
    return report | {
        "name": name,
        "preset": preset,
        "steps": len(metrics),
        "generated_tokens": int(generated),
        "erased_tokens": int(erased),
        "erasures": int(_total(metrics, names.ERASURES)),
        "seconds": seconds | {"evaluation": sum(e.seconds for e in evaluations)} | dict(process_seconds),
        "working_share": working / seconds["steps"] if seconds["steps"] else None,
        "peak_memory_gib": peak_memory_gib,
        "warned_steps": sum(1 for line in metrics if line.get(names.WARNINGS)),
        "learner_tokens": int(_total(metrics, names.LEARNER_TOKENS)),
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write it as JSON, whole or not at all."""
    write_text(path, json.dumps(report, indent=2) + "\n")


def final_table(report: Mapping[str, Any], directory: Path) -> RenderableType:
    """Accuracy before and after, then what the run cost and where its files are."""
    k = report["plain_after"]["k"]
    accuracy = Table(title=f"{report['name']}: held-out problems")
    accuracy.add_column("sampling")
    for heading in (f"Avg@{k} before", "after", f"Pass@{k} before", "after", "cascades before", "after"):
        accuracy.add_column(heading, justify="right")
    accuracy.add_column("tokens/response after", justify="right")
    for mode in MODES:
        before, after = report[f"{mode}_before"], report[f"{mode}_after"]
        cells = [_share(run[key]) for key in ("avg_at_k", "pass_at_k", "cascade_rate") for run in (before, after)]
        tokens = after["generated_tokens"] / (after["problems"] * after["k"])
        accuracy.add_row(mode, *cells, f"{tokens:.0f}")
    seconds = report["seconds"]
    costs = Table(show_header=False)
    costs.add_row("generated tokens", f"{report['generated_tokens']:,}, {report['erased_tokens']:,} of them erased")
    costs.add_row("erasures", f"{report['erasures']:,}")
    parts = ("rollout", "train", "sync", "other", "evaluation", "start")
    costs.add_row("seconds", ", ".join(f"{part} {seconds[part]:.0f}" for part in parts if part in seconds))
    costs.add_row("generating or training", _share(report["working_share"]) + " of a step's time")
    costs.add_row("peak memory", f"{report['peak_memory_gib']:.1f} GiB, this process and those it started")
    if report["warned_steps"]:
        costs.add_row("warnings", f"in {report['warned_steps']} of {report['steps']} steps, see log/driver.log")
    costs.add_row("files", f"{directory}: report.json, metrics.jsonl, plots/, trajectories/, policy/")
    return Stack(accuracy, costs)


def comparison_table(reports: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Each run in a row, at equal generated tokens."""
    k = reports[0]["plain_after"]["k"]
    table = Table(title="At equal generated tokens")
    table.add_column("run")
    headings = (
        f"plain Avg@{k} before",
        "after",
        f"plain Pass@{k} after",
        f"erasable Avg@{k} after",
        "steps",
        "generated tokens",
        "seconds in steps",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            report["name"],
            _share(report["plain_before"]["avg_at_k"]),
            _share(report["plain_after"]["avg_at_k"]),
            _share(report["plain_after"]["pass_at_k"]),
            _share(report["erasable_after"]["avg_at_k"]),
            str(report["steps"]),
            f"{report['generated_tokens']:,}",
            f"{report['seconds']['steps']:.0f}",
        )
    return table


def _total(metrics: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name) or 0.0 for line in metrics)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
