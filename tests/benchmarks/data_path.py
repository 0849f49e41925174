"""What the driver itself pays for a step's tokens: CPU seconds and memory for a million of them.

A real driver, with all that it does in a step, in a process of its own. Responses of 8,192 committed tokens are made in
other processes and travel as a replica's do; ranks fetch and batch them, and the writer writes them. Only the model is
missing on both sides.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.report import Finding

ROOT = Path(__file__).resolve().parents[2]
RESPONSE_TOKENS = 8192
RESPONSES_PER_GROUP = 16
STEPS = 3
CPU_SECONDS = 0.3
MEGABYTES = 100.0
SIZES = ((8, "1 million"), (62, "8 million"))
"""Groups per step, and about how many tokens these have."""

PROCESS_SECONDS = 900


def measure_data_path(directory: Path) -> list[Finding]:
    """CPU and memory per million response tokens, at a step of one and of eight million."""
    findings = []
    for groups, size in SIZES:
        found = measured(directory / str(groups), groups)
        detail = f"{found['tokens']:,} tokens, {found['responses']} responses, {found['step_seconds']:.1f} s a step"
        findings += [
            Finding(
                f"driver's CPU seconds per million response tokens, {size} a step",
                found["cpu_seconds"],
                CPU_SECONDS,
                detail,
                at_least=False,
            ),
            Finding(
                f"driver's memory in MB per million response tokens, {size} a step",
                found["megabytes"],
                MEGABYTES,
                f"peak beyond {found['base_megabytes']:.0f} MB",
                at_least=False,
            ),
        ]
    return findings


def measured(directory: Path, groups: int) -> dict[str, Any]:
    """The figures of a driver's process. `directory`: where its run goes."""
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.benchmarks.data_path", str(directory), str(groups)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROCESS_SECONDS, check=False)
    if finished.returncode:
        raise RuntimeError(f"the driver ended with status {finished.returncode}:\n{finished.stdout}{finished.stderr}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


class Meter:
    """CPU time and memory of this process at the end of each step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.times: list[float] = []
        self.resident: list[float] = []

    def mark(self, version: int) -> None:
        """Called at every weight sync: the first is before the first step."""
        self.cpu.append(time.process_time())
        self.times.append(time.monotonic())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def drive(directory: Path, groups: int) -> dict[str, Any]:
    """A run of `STEPS` steps of which the first warms up: what the others cost."""
    import ray

    from tests.synthetic import SyntheticRollouts, synthetic_config, synthetic_run

    meter = Meter()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**30)
    try:
        rollouts = SyntheticRollouts(RESPONSE_TOKENS, actors=2, on_sync=meter.mark)
        synthetic_run(synthetic_config(directory, groups, RESPONSES_PER_GROUP, RESPONSE_TOKENS, STEPS), rollouts)
    finally:
        ray.shutdown()
    responses = groups * RESPONSES_PER_GROUP
    steps = STEPS - 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    millions = responses * RESPONSE_TOKENS / 1e6
    return {
        "tokens": responses * RESPONSE_TOKENS,
        "responses": responses,
        "cpu_seconds": (meter.cpu[-1] - meter.cpu[1]) / steps / millions,
        "step_seconds": (meter.times[-1] - meter.times[1]) / steps,
        "base_megabytes": meter.resident[0],
        "megabytes": (peak - meter.resident[0]) / millions,
    }


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (quiet CPU settings)

    print(json.dumps(drive(Path(sys.argv[1]), int(sys.argv[2]))))
