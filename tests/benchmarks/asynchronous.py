"""Generation beside training against one after the other: steps an hour, and accuracy after equal samples.

The demo with one replica and one rank, on a core each.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import metrics as names
from tests.benchmarks.report import Finding

ROOT = Path(__file__).resolve().parents[2]
STEPS, LONG_STEPS = 12, 32
WARM_UP = 2
SEEDS = 3
RUN_SECONDS = 2400
ONE_CORE_EACH = ("learner.ranks=1", "learner.threads_per_rank=1", "rollout.engine.threads=1")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run of the demo."""

    steps: list[dict[str, Any]]
    report: dict[str, Any]

    @property
    def steps_per_hour(self) -> float:
        """Of the steps after the first ones, which compile and fill caches. Evaluations do not count."""
        warm = self.steps[WARM_UP:]
        return 3600.0 * len(warm) / sum(step[names.STEP_SECONDS] for step in warm)

    def __str__(self) -> str:
        parts = {
            "rollout": names.ROLLOUT_SECONDS,
            "train": names.TRAIN_SECONDS,
            "sync": names.SYNC_SECONDS,
            "overlap": names.OVERLAP_SECONDS,
            "wait": names.WAIT_SECONDS,
            "blocked": names.BLOCKED_SECONDS,
        }
        seconds = {part: statistics.fmean(step[name] for step in self.steps[WARM_UP:]) for part, name in parts.items()}
        dropped = sum(step[names.DROPPED_GROUPS] for step in self.steps)
        shown = ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items())
        return f"{self.steps_per_hour:.0f} steps/h ({shown}, {dropped} groups dropped)"


def measure_asynchronous(directory: Path) -> list[Finding]:
    """Steps an hour with `max_staleness` 1 against 0."""
    runs = [_demo(directory, staleness, 0, STEPS, 16) for staleness in (0, 1)]
    ratio = runs[1].steps_per_hour / runs[0].steps_per_hour
    detail = f"synchronous {runs[0]}; asynchronous {runs[1]}"
    return [Finding("asynchronous against synchronous, steps an hour", ratio, 1.3, detail)]


def measure_accuracy(directory: Path) -> list[Finding]:
    """Accuracy after equal samples, `SEEDS` seeds each: the difference in standard errors of the seeds."""
    runs = {
        staleness: [_demo(directory, staleness, seed, LONG_STEPS, 64) for seed in range(SEEDS)] for staleness in (0, 1)
    }
    accuracy = {s: [run.report["plain_after"]["avg_at_k"] for run in of_kind] for s, of_kind in runs.items()}
    error = sum(statistics.variance(values) / SEEDS for values in accuracy.values()) ** 0.5
    difference = statistics.fmean(accuracy[1]) - statistics.fmean(accuracy[0])
    ratios = [a.steps_per_hour / s.steps_per_hour for s, a in zip(runs[0], runs[1], strict=True)]
    detail = "; ".join(
        f"max_staleness {staleness}: " + ", ".join(f"{value:.3f}" for value in values)
        for staleness, values in accuracy.items()
    )
    return [
        Finding("asynchronous less accurate, standard errors", -difference / max(error, 1e-9), 2.0, detail, False),
        Finding("asynchronous against synchronous, steps an hour, least of the seeds", min(ratios), 1.3, f"{ratios}"),
    ]


def _demo(directory: Path, staleness: int, seed: int, steps: int, problems: int) -> Run:
    name = f"staleness-{staleness}-seed-{seed}"
    settings = [f"steps={steps}", f"runs_directory={directory}", f"name={name}", f"evaluation.problems={problems}"]
    settings += [f"max_staleness={staleness}", f"seed={seed}", *ONE_CORE_EACH]
    command = [sys.executable, "-m", "learner.train", "--config", "deploy/configs/demo.yaml"]
    for setting in settings:
        command += ["--set", setting]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if finished.returncode:
        raise RuntimeError(f"{name} ended with status {finished.returncode}:\n{finished.stdout}{finished.stderr}")
    run = directory / name
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return Run([json.loads(line) for line in lines], json.loads((run / "report.json").read_text()))
