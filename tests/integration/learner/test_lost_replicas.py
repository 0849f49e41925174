"""Training through its command line while its only replica is killed, and later hangs: real Ray, vLLM and DeepSpeed."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from common import metrics as names
from learner.run.trajectory_files import read_trajectories
from tests.integration.learner.test_train import RUN_SECONDS, finish, lines, place, start, wait_for_step

__all__ = ["place"]
GROUPS, SIZE, STEPS = 12, 8, 4


def engine_of(process: "subprocess.Popen[str]") -> psutil.Process:
    """vLLM's engine process of the run's one replica."""
    (engine,) = [p for p in psutil.Process(process.pid).children(recursive=True) if "EngineCor" in p.name()]
    return engine


@pytest.mark.timeout(2 * RUN_SECONDS)
def test_a_replica_that_is_killed_or_hangs_in_the_middle_of_a_step_costs_no_response(place: Path):
    settings = {
        "steps": STEPS,
        "rollout.groups_per_step": GROUPS,
        "rollout.responses_per_group": SIZE,
        "rollout.max_response_tokens": 60,
        "rollout.engine.stall_seconds": 15,
        "evaluation.problems": 1,
        "checkpoint.latest": "false",
        "checkpoint.every_steps": 0,
    }
    process = start(place, "--name", "lost", *(f"--set={name}={value}" for name, value in settings.items()))
    directory = place / "runs" / "lost"
    try:
        wait_for_step(process, directory, 1)
        time.sleep(1.0)
        engine_of(process).kill()
        wait_for_step(process, directory, 2)
        time.sleep(1.0)
        hung = engine_of(process)
        hung.send_signal(signal.SIGSTOP)
    except BaseException:
        process.kill()
        raise
    status, output = finish(process)
    assert status == 0, output
    assert not hung.is_running(), "a replica's engine is left, with its memory"
    metrics = lines(directory)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    # More on a machine that is so busy that an engine makes no step for 15 s.
    assert sum(line[names.REPLICA_RESTARTS] for line in metrics) >= 2
    assert sum(line[names.RESUBMISSIONS] for line in metrics) > 0
    log = (directory / "log" / "driver.log").read_text()
    assert "replica 0 died and is being restarted" in log
    assert "replica 0 made no step for" in log
    for step in range(1, STEPS + 1):
        responses = read_trajectories(directory / "trajectories" / f"step_{step}.parquet")
        assert len({(r.group_id, r.sample) for r in responses}) == len(responses) == GROUPS * SIZE
        for response in responses:
            assert response.finish_reason == "stop" or len(response.token_ids) == 60
            assert set(response.token_versions) == {step - 1}
