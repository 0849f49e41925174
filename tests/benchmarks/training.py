"""Where a demo step's time goes, and what the whole demo takes in memory: from a short run of the demo itself."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import metrics as names
from tests.benchmarks.report import Finding

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
RUN_SECONDS = 1200


def measure_training(directory: Path) -> list[Finding]:
    """The demo for `STEPS` steps: the share of a step that generates or trains, and the peak memory of everything."""
    settings = [f"steps={STEPS}", f"runs_directory={directory}", "name=bench", "evaluation.problems=16"]
    command = [sys.executable, "-m", "learner.train", "--config", "deploy/configs/demo.yaml"]
    for setting in settings:
        command += ["--set", setting]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if finished.returncode:
        raise RuntimeError(f"the demo ended with status {finished.returncode}:\n{finished.stdout}{finished.stderr}")
    run = directory / "bench"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((run / "report.json").read_text())
    # The first step compiles and fills caches.
    shares = [
        (step[names.ROLLOUT_SECONDS] + step[names.TRAIN_SECONDS]) / step[names.STEP_SECONDS] for step in steps[1:]
    ]
    parts = {
        part: statistics.median(step[name] for step in steps[1:])
        for part, name in (
            ("rollout", names.ROLLOUT_SECONDS),
            ("train", names.TRAIN_SECONDS),
            ("sync", names.SYNC_SECONDS),
            ("other", names.OTHER_SECONDS),
        )
    }
    detail = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items())
    return [
        Finding(
            "share of a demo step that generates or trains",
            statistics.median(shares),
            0.85,
            f"medians of {len(shares)} steps: {detail}",
        ),
        Finding(
            "peak memory of the whole demo, GiB",
            report["peak_memory_gib"],
            8.0,
            f"all processes, a run of {STEPS} steps",
            at_least=False,
        ),
    ]
