"""Training through its command line, with real Ray, vLLM and DeepSpeed, on a model of a few thousand parameters."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import metrics as names
from common.manifest import verify_manifest
from common.trajectory import Trajectory
from learner.run.trajectory_files import read_trajectories
from tests.models import tiny_qwen3

ROOT = Path(__file__).resolve().parents[3]
RAY = str(Path(sys.executable).with_name("ray"))
RUN_SECONDS = 420
CLUSTER_SECONDS = 90
STEPS = 6
STOPS = "aehiorst"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a data file and a configuration for both."""
    place = tmp_path_factory.mktemp("train")
    tiny_qwen3(place / "model", max_length=128)
    rows = [{"question": f"{n} and {n + 1}?", "answer": str(n)} for n in range(12)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "run",
        "runs_directory": str(place / "runs"),
        "steps": STEPS,
        "model": {"path": str(place / "model"), "max_length": 96},
        "data": {
            "source": "file",
            "train_path": str(place / "rows.jsonl"),
            "test_path": str(place / "rows.jsonl"),
            "chat": False,
        },
        "reward": {"kind": "function", "function": "tests.user_rewards:even_bytes"},
        "rollout": {
            "groups_per_step": 2,
            "responses_per_group": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 24,
            "group_share": {"mode": "fixed", "share": 0.5},
            # A fixed threshold: an adaptive one depends on the order in which responses reach the engine, so that two
            # undisturbed runs differ. U is about 4 to 6 here.
            "erasure": {"segmentation": {"mode": "fixed", "length": 6}, "threshold": 4.7},
            "engine": {"max_concurrent_responses": 8},
        },
        "learner": {"ranks": 1, "zero_stage": 1, "optimizer": {"learning_rate": 1e-3}},
        "evaluation": {"problems": 2, "responses_per_problem": 2},
        "checkpoint": {"every_steps": 1, "keep": 2},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(settings))
    return place


def start(place: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The command line in a process group of its own, as a shell would start it."""
    return subprocess.Popen(
        [sys.executable, "-m", "learner.train", "--config", str(place / "config.yaml"), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: "subprocess.Popen[str]", seconds: float = RUN_SECONDS) -> tuple[int, str]:
    """Exit status and everything that was printed; the process group is gone afterwards."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not finished within {seconds:g} s:\n{output}")
    return process.returncode, output


def train(place: Path, *arguments: str) -> tuple[int, str]:
    return finish(start(place, *arguments))


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def wait_for_step(process: "subprocess.Popen[str]", directory: Path, step: int) -> None:
    """Return as soon as the run has finished `step` steps."""
    deadline = time.monotonic() + RUN_SECONDS
    while len(lines(directory)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} not finished within {RUN_SECONDS} s"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole_output(place: Path) -> str:
    """What the terminal shows of a run that nothing disturbed."""
    status, output = train(place, "--name", "whole")
    assert status == 0, output
    return output


@pytest.fixture(scope="module")
def whole(place: Path, whole_output: str) -> Path:
    """That run's directory."""
    return place / "runs" / "whole"


def test_a_run_leaves_metrics_report_plots_trajectories_and_a_model(whole: Path):
    metrics = lines(whole)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert line.keys() == names.ALL - names.OPTIONAL
        assert line[names.GENERATED_TOKENS] >= line[names.ERASED_TOKENS] >= 0
        assert line[names.POLICY_VERSION] == line["step"]
        parts = (names.ROLLOUT_SECONDS, names.TRAIN_SECONDS, names.SYNC_SECONDS, names.OTHER_SECONDS)
        assert sum(line[part] for part in parts) == pytest.approx(line[names.STEP_SECONDS])
    assert sum(line[names.ERASED_TOKENS] for line in metrics) > 0
    assert any(line[names.LOSS] for line in metrics)
    report = json.loads((whole / "report.json").read_text())
    for key in ("plain_before", "plain_after", "erasable_before", "erasable_after"):
        assert report[key].keys() >= {"avg_at_k", "pass_at_k", "k", "cascade_rate", "generated_tokens"}
    assert report["plain_before"]["erasures"] == 0
    assert 0.5 < report["peak_memory_gib"] < 8.0
    assert sorted(path.name for path in (whole / "plots").iterdir()) == [
        "accuracy.png",
        "erase_rate.png",
        "reward.png",
        "threshold.png",
    ]
    assert list((whole / "tensorboard").iterdir())
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step_5", "step_6"]
    (first, *_) = read_trajectories(whole / "trajectories" / "step_1.parquet")
    assert set(first.token_versions) == {0}


def test_the_exported_policy_is_the_one_that_was_trained(whole: Path, place: Path):
    policy = AutoModelForCausalLM.from_pretrained(whole / "policy", dtype=torch.float32)
    start_model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole / "policy")
    of_start = AutoTokenizer.from_pretrained(place / "model")
    assert tokenizer.get_vocab() == of_start.get_vocab()
    assert tokenizer("7 and 8?")["input_ids"] == of_start("7 and 8?")["input_ids"] != []
    differences = [
        float((new - old).abs().max().detach())
        for new, old in zip(policy.parameters(), start_model.parameters(), strict=True)
    ]
    assert max(differences) > 1e-4


def test_the_terminal_shows_the_run_and_nothing_else(whole_output: str):
    assert "whole: held-out problems" in whole_output
    for foreign in ("INFO", "WARNING", "Warning", "vllm", "deepspeed", "ray::", "pid="):
        assert foreign not in whole_output


def test_a_finished_run_has_nothing_to_resume(place: Path, whole: Path):
    status, output = train(place, "--name", "whole", "--resume")
    assert status == 0
    assert "is finished after 6 steps" in output


def test_a_finished_run_is_not_overwritten(place: Path, whole: Path):
    before = (whole / "metrics.jsonl").read_bytes()
    status, output = train(place, "--name", "whole")
    assert status == 2
    assert "already holds a run" in output
    assert "Traceback" not in output
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.timeout(3 * RUN_SECONDS)
def test_a_run_that_was_killed_and_stopped_equals_one_that_was_not(place: Path, whole: Path):
    directory = place / "runs" / "broken"
    process = start(place, "--name", "broken")
    wait_for_step(process, directory, 2)
    process.kill()
    finish(process)
    done = len(lines(directory))

    process = start(place, "--name", "broken", "--resume")
    wait_for_step(process, directory, done + 1)
    # As a terminal does it: to every process of the group, Ray's included.
    os.killpg(process.pid, signal.SIGINT)
    status, output = finish(process)
    assert status == 130, output
    assert "Traceback" not in output
    done = len(lines(directory))
    assert (directory / "checkpoints" / f"step_{done}").is_dir()
    assert done < STEPS, "the run was over before it could be stopped"

    # A bit that flipped on the disk: the checkpoint before it is taken, and the step is done again.
    weights = max((directory / "checkpoints" / f"step_{done}").rglob("*.pt"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 3] ^= 16
    weights.write_bytes(data)
    # As after an error of memory: settings that do not change the loss.
    changes = ("learner.tokens_per_microbatch=64", "learner.gradient_checkpointing=true")
    status, output = train(place, "--name", "broken", "--resume", *(f"--set={change}" for change in changes))
    assert status == 0, output
    assert f"step_{done} is damaged: learner/deepspeed/{weights.name} is not what was written" in output
    for mine, theirs in zip(lines(directory), lines(whole), strict=True):
        for name in (names.GENERATED_TOKENS, names.ERASED_TOKENS, names.REWARD_MEAN):
            assert mine[name] == theirs[name], (mine["step"], name)
        for name in (names.LOSS, names.GRADIENT_NORM):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (mine["step"], name)
    for step in range(1, STEPS + 1):
        drawn = [
            [(t.prompt_id, t.seed) for t in read_trajectories(run / "trajectories" / f"step_{step}.parquet")]
            for run in (directory, whole)
        ]
        assert drawn[0] == drawn[1]


@pytest.mark.timeout(2 * RUN_SECONDS)
def test_generation_beside_training_trains_every_turn_once_and_survives_a_kill(place: Path):
    directory = place / "runs" / "asynchronous"
    command = ("--name", "asynchronous", "--set=max_staleness=1", "--set=steps=8", "--resume", "auto")
    process = start(place, *command)
    wait_for_step(process, directory, 3)
    process.kill()
    finish(process)
    # The same command again, as whoever restarts a job gives it.
    status, output = train(place, *command)
    assert status == 0, output
    assert "continuing" in output
    account = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]
    turns = [turn for line in account for turn in line["trained"]]
    assert sorted(turn["turn"] for turn in turns) == list(range(8 * 2))
    assert len({(turn["epoch"], turn["prompt"]) for turn in turns}) == len(turns)
    for line, metrics in zip(account, lines(directory), strict=True):
        trajectories = read_trajectories(directory / "trajectories" / f"step_{line['step']}.parquet")
        versions = {version for t in trajectories for version in t.token_versions}
        # The policy that the step changes is that of the step before it.
        assert line["step"] - 1 - min(versions) == metrics[names.STALENESS_MAX] <= 1
        assert max(versions) <= line["step"] - 1
    assert max(line[names.STALENESS_MAX] for line in lines(directory)) == 1
    assert sum(line[names.OVERLAP_SECONDS] for line in lines(directory)) > 0.0


def damaged_model(place: Path) -> list[str]:
    weights = next((place / "model").glob("*.safetensors"))
    copy = place / "damaged"
    copy.mkdir()
    for path in (place / "model").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / weights.name).write_bytes(weights.read_bytes()[:-100])
    return ["--set", f"model.path={copy}"]


def empty_model(place: Path) -> list[str]:
    (place / "empty").mkdir()
    return ["--set", f"model.path={place / 'empty'}"]


def short_model(place: Path) -> list[str]:
    return ["--set", "model.max_length=4096"]


def bad_rows(place: Path) -> list[str]:
    (place / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    return ["--set", f"data.train_path={place / 'bad.jsonl'}"]


def long_prompts(place: Path) -> list[str]:
    return ["--set", "rollout.max_prompt_tokens=4"]


def missing_reward(place: Path) -> list[str]:
    return ["--set", "reward.function=tests.user_rewards:missing"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged_model, "is damaged"),
        (empty_model, "is no Hugging Face model directory: no config.json; it holds nothing"),
        (short_model, "model.max_length (4096) exceeds the 128 positions"),
        (bad_rows, "it is not valid JSON (Expecting"),
        (long_prompts, "none of the 12 train prompts fits into rollout.max_prompt_tokens (4)"),
        (missing_reward, "has no 'missing'"),
    ],
)
def test_bad_input_ends_with_status_2_a_message_and_no_directory(
    place: Path, spoil: Callable[[Path], list[str]], words: str
):
    status, output = train(place, "--name", "bad", *spoil(place))
    assert status == 2, output
    assert words in output.replace("\n", " ")
    assert "Traceback" not in output
    assert not (place / "runs" / "bad").exists()


def test_a_reward_that_fails_ends_with_status_1_and_names_the_log(place: Path):
    status, output = train(place, "--name", "raising", "--set", "reward.function=tests.user_rewards:raises")
    assert status == 1, output
    assert "KeyError" in output
    assert "Traceback" not in output
    log = place / "runs" / "raising" / "log" / "driver.log"
    assert str(log) in output
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("argument", "heavy"),
    [
        ("--help", ["torch", "ray", "deepspeed", "transformers", "vllm", "matplotlib"]),
        ("--dry-run", ["ray", "deepspeed", "vllm", "matplotlib"]),
    ],
)
def test_help_and_dry_run_answer_without_loading_the_heavy_packages(place: Path, argument: str, heavy: list[str]):
    code = (
        "import sys\nfrom learner.train import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"heavy = set({heavy}) & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--config", str(place / "config.yaml"), "--name", "dry", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@contextmanager
def running_cluster(directory: Path) -> Iterator[dict[str, str]]:
    """A Ray cluster with a dashboard, as `ray start` makes it; what a client's environment needs for its jobs."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    port, dashboard, agent, client = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    variables = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "OMP_NUM_THREADS": "1",
    }
    # Ray's sockets lie below this directory, and their paths may not be long.
    temporary = tempfile.mkdtemp(prefix="e3rl-test-", dir="/tmp")
    command = [RAY, "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats", "--temp-dir", temporary]
    command += ["--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
    command += ["--ray-client-server-port", str(client), "--object-store-memory", str(2**27)]
    with (directory / "cluster.log").open("w") as log:
        head = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=variables, start_new_session=True, text=True
        )
    try:
        deadline = time.monotonic() + CLUSTER_SECONDS
        while "Ray runtime started" not in (printed := (directory / "cluster.log").read_text()):
            assert head.poll() is None, printed
            assert time.monotonic() < deadline, f"no cluster within {CLUSTER_SECONDS} s:\n{printed}"
            time.sleep(0.2)
        yield variables | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        try:
            head.wait(CLUSTER_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def check_stops(place: Path, responses: list[Trajectory]) -> None:
    """Responses end with the first token that has one of `STOPS` in it, whether they could be erased or not."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    stopped = set()
    for response in responses:
        text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
        ends = [place for place, letter in enumerate(text) if letter in STOPS]
        assert response.text == (text[: ends[0]] if ends else text)
        if ends:
            assert ends == [len(text) - 1]
            assert response.finish_reason == "stop"
            stopped.add(response.erasable)
    assert stopped == {True, False}


@pytest.mark.timeout(2 * RUN_SECONDS)
def test_a_job_of_a_ray_cluster_trains_and_stops_with_a_checkpoint(place: Path, tmp_path: Path):
    def ray_job(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [RAY, "job", *arguments]
        return subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_SECONDS)

    training = ["--", sys.executable, "-m", "learner.train", "--config", str(place / "config.yaml"), "--name"]
    with running_cluster(tmp_path) as variables:
        finished = ray_job("submit", *training, "job", "--set=steps=2", f"--set=rollout.stop=[{', '.join(STOPS)}]")
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "job: held-out problems" in finished.stdout
        assert [line["step"] for line in lines(place / "runs" / "job")] == [1, 2]

        for step in (1, 2):
            responses = read_trajectories(place / "runs" / "job" / "trajectories" / f"step_{step}.parquet")
            check_stops(place, responses)
        # Rewards take long from the third step on, and no checkpoint is due: the job is stopped in mid-step.
        slow = f'{{"env_vars": {{"E3RL_TEST_DIRECTORY": "{tmp_path}"}}}}'
        submit = ["submit", "--no-wait", "--submission-id", "endless", "--runtime-env-json", slow]
        changes = ("steps=1000", "checkpoint.every_steps=0", "reward.timeout_seconds=300")
        changes += ("reward.function=tests.user_rewards:even_bytes_for_a_while",)
        begun = ray_job(*submit, *training, "stopped", *(f"--set={change}" for change in changes))
        assert begun.returncode == 0, begun.stderr
        directory = place / "runs" / "stopped"
        deadline = time.monotonic() + RUN_SECONDS
        while len(lines(directory)) < 2:
            assert time.monotonic() < deadline, ray_job("logs", "endless").stdout
            time.sleep(0.1)
        (tmp_path / "slow").touch()
        stopped = ray_job("stop", "endless")
        assert "was stopped" in stopped.stdout + stopped.stderr
        verify_manifest(directory / "checkpoints" / f"step_{len(lines(directory))}")
