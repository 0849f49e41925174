"""What must be true of a run when it is over, whatever happened to it."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil

from common.manifest import verify_manifest
from tests.chaos.training import GROUPS_PER_STEP, lines

OURS = ("e3rl-", "e3rl_")


def check_ledger(directory: Path) -> int:
    """Every turn up to the last was trained in one step exactly; returns how many there were."""
    steps = lines(directory / "ledger.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)), "a step is missing, or there twice"
    turns = sorted(group["turn"] for line in steps for group in line["trained"])
    assert len(turns) == len(set(turns)) == GROUPS_PER_STEP * len(steps), "a prompt was trained twice in its epoch"
    # The last turns may have been overtaken by some that were drawn after them.
    late = len(turns) - next((n for n, turn in enumerate(turns) if turn != n), len(turns))
    assert late <= 2 * GROUPS_PER_STEP, f"turns were left out: {late} of the trained ones come after a gap"
    return len(turns)


def check_staleness(directory: Path, bound: int) -> None:
    """No group was older than it may be when it was trained."""
    found = [group["staleness"] for line in lines(directory / "ledger.jsonl") for group in line["trained"]]
    assert max(found) <= bound, f"staleness {max(found)} where {bound} is allowed"


def check_metrics(directory: Path) -> None:
    """A line a step, and finite losses."""
    metrics = lines(directory / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    losses: list[Any] = [line["learner/loss"] for line in metrics]
    assert all(loss is not None and math.isfinite(loss) for loss in losses), losses
    newest = max((directory / "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    verify_manifest(newest)


class Leftovers:
    """What is in places that all runs share, so that afterwards it can be said what is new."""

    def __init__(self) -> None:
        self._before = self._files()

    def check(self, *names: str) -> None:
        """Nothing of ours is left: no file, and no process with one of `names` in its command line."""
        new = sorted(self._files() - self._before)
        assert not new, f"left behind: {new}"
        processes = []
        for process in psutil.process_iter():
            try:
                text = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(name in text for name in names):
                processes.append(f"{process.pid} {text[:100]}")
        assert not processes, f"still running: {processes}"

    def _files(self) -> set[str]:
        places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
        return {str(path) for place in places for path in place.iterdir() if path.name.startswith(OURS)}
