"""The run that faults happen to: the command line in a process of its own, started again whenever it ends early."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.models import tiny_qwen3

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 90.0
PROMPTS = 10
GROUPS_PER_STEP = 2


def settings(place: Path, runs: Path, max_staleness: int, ranks: int) -> dict[str, Any]:
    """A small run of two replicas; it writes into `runs`."""
    return {
        "name": "chaos",
        "runs_directory": str(runs),
        "steps": 100_000,
        "max_staleness": max_staleness,
        "model": {"path": str(place / "model"), "max_length": 96},
        "data": {
            "source": "file",
            "train_path": str(place / "rows.jsonl"),
            "test_path": str(place / "rows.jsonl"),
            "chat": False,
        },
        "reward": {"kind": "function", "function": "tests.user_rewards:even_bytes"},
        "rollout": {
            "groups_per_step": GROUPS_PER_STEP,
            "responses_per_group": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 40,
            "group_share": {"mode": "fixed", "share": 0.5},
            "erasure": {"segmentation": {"mode": "fixed", "length": 8}},
            "engine": {"max_concurrent_responses": 8, "replicas": 2, "response_seconds": 30},
        },
        "learner": {"ranks": ranks, "zero_stage": 1, "step_seconds": 60},
        "sync": {"deadline_seconds": 30},
        "evaluation": {"problems": 2, "responses_per_problem": 1},
        "checkpoint": {"every_steps": 0, "keep": 2},
    }


class Training:
    """`patience`: seconds in which a run must have made a step again after a fault, whatever it was."""

    def __init__(self, place: Path, runs: Path, variables: dict[str, str], patience: float, **shape: int) -> None:
        self.patience = patience
        self.directory = runs / "chaos"
        self._place = place
        self._variables = variables
        self._process: subprocess.Popen[str] | None = None
        self.starts = 0
        tiny_qwen3(place / "model", max_length=128)
        rows = [{"question": f"{n} and {n + 1}?", "answer": str(n)} for n in range(PROMPTS)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "config.yaml").write_text(yaml.safe_dump(settings(place, runs, **shape)))

    def start(self, *arguments: str) -> None:
        """Begin, or go on from what there is: the same command in both cases."""
        self.starts += 1
        command = [sys.executable, "-m", "learner.train", "--config", str(self._place / "config.yaml")]
        with (self._place / f"driver_{self.starts}.log").open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--resume", "auto", *arguments],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=self._variables,
            )

    @property
    def process(self) -> "subprocess.Popen[str]":
        if self._process is None:
            raise RuntimeError("the run was not started")
        return self._process

    def kill(self) -> None:
        """The driver and what it started itself are gone from one moment to the next."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)

    def keep_alive(self) -> bool:
        """Start the run again if it has ended; whether it had. That is what a scheduler does."""
        if self.process.poll() is None:
            return False
        self.start()
        return True

    @property
    def steps(self) -> int:
        """Finished steps."""
        return len(lines(self.directory / "metrics.jsonl"))

    def await_steps(self, more: int) -> None:
        """Until `more` steps were made; a driver that ends meanwhile is started again."""
        goal = self.steps + more
        deadline = time.monotonic() + self.patience
        while self.steps < goal:
            self.keep_alive()
            if time.monotonic() > deadline:
                raise AssertionError(f"no step within {self.patience:g} s; the driver says:\n{self.last_words()}")
            time.sleep(0.2)

    def finish(self, more: int) -> None:
        """Let the run make `more` steps and end by itself."""
        self.stop()
        self.start("--set", f"steps={self.steps + more}")
        status = self.process.wait(self.patience)
        assert status == 0, f"the run ended with status {status}:\n{self.last_words()}"

    def last_words(self) -> str:
        """The end of what the driver printed."""
        return (self._place / f"driver_{self.starts}.log").read_text()[-3000:]


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file that may be written to."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
