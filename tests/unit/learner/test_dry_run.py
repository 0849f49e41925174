"""`--dry-run`: all that is wrong at once, what could not be checked, and figures that agree with what they describe."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from common.config import RunConfig, dump_yaml, load_config
from common.manifest import write_manifest
from learner.loop.driver_state import DriverState, save_state
from learner.planning.machine import memory_lines
from learner.planning.memory import GIB
from learner.planning.shape import ModelShape
from learner.policy.batching import plan_microbatches
from learner.run.run_directory import RunDirectory
from learner.run.sizes import derived_sizes
from learner.train import main
from tests.configs import run_config
from tests.models import tiny_qwen3

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": n} for n in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("model"), max_length=256)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> RunConfig:
    """A run that could begin."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"question": "x" * 100, "answer": "y"}]))
    return run_config(
        runs_directory=str(tmp_path / "runs"),
        model={"path": str(model)},
        data={"source": "file", "train_path": str(rows), "test_path": str(rows)},
        reward={"kind": "function", "function": "tests.user_rewards:length"},
        evaluation={"problems": 4},
    )


def run(config: RunConfig, tmp_path: Path, *arguments: str) -> int:
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    return main(["--config", str(path), "--dry-run", *arguments])


def test_a_run_that_could_begin_is_shown_in_figures(
    config: RunConfig, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(config, tmp_path) == 0
    printed, complaints = capsys.readouterr()
    assert not complaints
    assert multiprocessing.active_children() == []
    # The output is a configuration, whatever is in the first prompt.
    assert RunConfig.model_validate(yaml.safe_load(printed)) == config
    assert load_config(tmp_path / "runs" / "test" / "config.yaml") == config
    shown = dict(line[2:].split(": ", 1) for line in printed.splitlines() if line.startswith("# ") and ": " in line)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert shown["parameters"] == f"{parameters:,}"
    assert shown["reward"] == "tests.user_rewards:length reads prompt, response, answer"
    assert shown["train prompts"].startswith("13 of 15 to 101 tokens, median 15; 1 (7.7%) are longer")
    assert shown["epochs"] == "0.67 = 4 steps x 2 groups / 12 prompts"
    assert "embedding rows that no token has" in shown["sentinels"]
    assert "#   | What is 0 + 0?" in printed
    assert "first prompt, train-0, 15 tokens" in printed
    assert "GiB there" in shown["this machine"] or "GPU(s)" in shown["this machine"]
    assert "NOT CHECKED" not in printed


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_written(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    wrong = [
        ("model.path", "/no/such/model", "model.path: there is no directory /no/such/model"),
        ("data.train_path", "/no/such/rows.jsonl", "data file /no/such/rows.jsonl does not exist"),
        ("reward.function", "no_such_module:f", "there is no module 'no_such_module'"),
    ]
    changes = [part for setting, value, _ in wrong for part in ("--set", f"{setting}={value}")]
    assert run(config, tmp_path, *changes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong)
    for line, (_, _, words) in zip(lines, wrong, strict=True):
        assert line.startswith("error: ")
        assert words in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.max_length=300", "exceeds the 256 positions"),
        ("model.sentinel_ids=[65, 66]", "ordinary token"),
        ("data.chat_template_kwargs={enable_thinking: false}", "chat template does not read enable_thinking"),
        ("data.columns.answer=anwser", "13 of 13 rows can't be used: no column 'anwser'"),
        ("rollout.max_prompt_tokens=5", "none of the 13 train prompts fits"),
        ("rollout.groups_per_step=13", "12 train prompts are fewer than rollout.groups_per_step (13)"),
        ("reward.function=tests.user_rewards:half", "asks for 'value', which there is not"),
        ("reward={kind: chain}", "reward.kind 'chain' can't check it"),
    ],
)
def test_each_thing_that_needs_no_engine_is_checked(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, words: str
):
    assert run(config, tmp_path, "--set", setting) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_what_is_on_the_hub_only_is_said_to_be_unchecked(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = "data={source: huggingface, name: someone/something}"
    assert run(config, tmp_path, "--set", "model.path=someone/something-1B", "--set", data) == 0
    unchecked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# NOT CHECKED")]
    assert len(unchecked) == 2
    assert "someone/something-1B is no directory here, and not in this machine's Hugging Face cache" in unchecked[0]
    assert "sentinels" in unchecked[0]
    assert "'someone/something', split 'train' can't be loaded" in unchecked[1]


def test_rows_that_are_left_out_are_told(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + '{"question": "?", "answer": null}\n')
    assert run(config, tmp_path, "--set", "data.on_bad_row=skip") == 0
    assert "# data: " in (printed := capsys.readouterr().out)
    assert "1 of 14 rows can't be used" in printed


def test_a_prompt_s_control_characters_do_not_reach_the_terminal(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row | {"question": "a\x1b[2J\r\x85b\nc"}) + "\n" for row in ROWS))
    assert run(config, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "#   | a\\x1b[2J\\r\\x85b\n#   | c\n" in printed
    assert RunConfig.model_validate(yaml.safe_load(printed)) == config


def test_what_can_not_be_resumed_or_forked_is_wrong_in_a_dry_run_too(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(config, tmp_path, "--resume") == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert run(config, tmp_path, "--fork", "new") == 2
    assert "holds no run to fork" in capsys.readouterr().err
    directory = RunDirectory.create(config)
    directory.checkpoint(1).mkdir()
    save_state(directory.checkpoint(1), DriverState(step=1))
    write_manifest(directory.checkpoint(1))
    directory.close()
    assert run(config, tmp_path, "--resume") == 0
    assert run(config, tmp_path, "--resume", "--set", "seed=1") == 2
    assert "seed: 0 in the run, 1 now" in capsys.readouterr().err
    assert run(config, tmp_path, "--compare", "--set", "learner.optimizer.schedule=cosine") == 2
    assert "constant, not cosine" in capsys.readouterr().err
    assert run(config, tmp_path, "--fork", "new", "--set", "seed=1") == 0
    assert load_config(tmp_path / "runs" / "new" / "config.yaml").seed == 1


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 160), (1, 500), (2, 700), (4, 4000)])
def test_micro_batches_are_never_more_than_shown(ranks: int, tokens: int):
    config = run_config(learner={"ranks": ranks, "tokens_per_microbatch": tokens})
    minibatches = config.learner.minibatches_per_step
    text = dict(derived_sizes(config))["micro-batches per step and rank"]
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    planned = plan_microbatches([longest] * (config.responses_per_step // minibatches), ranks, tokens)
    assert text.startswith(f"at most {minibatches * max(map(len, planned))} = ")


def shape(parameters: int) -> ModelShape:
    """Two layers with two heads of keys and values, of 16 numbers each: 512 bytes a token in float32."""
    return ModelShape(
        parameters=parameters,
        multiplied=parameters,
        layers=2,
        hidden=64,
        intermediate=128,
        vocabulary=512,
        heads=4,
        kv_heads=2,
        head_dim=16,
    )


def test_a_machine_that_is_too_small_and_a_cache_that_is_are_told():
    small = shape(GIB)
    assert dict(memory_lines(run_config(), shape(10**13), []))["this machine"].endswith("THIS MACHINE IS TOO SMALL")
    assert "TOO SMALL" in dict(memory_lines(run_config(), small, [80 * GIB]))["this machine"]
    assert "TOO SMALL" not in dict(memory_lines(run_config(), small, [80 * GIB] * 2))["this machine"]
    # A response has 161 tokens: six blocks of 32.
    cache = dict(memory_lines(run_config(), small, []))["KV cache of a replica"]
    assert cache.startswith(f"room for {GIB // (512 * 32) // 6:,} responses")
    wide = replace(small, layers=64, kv_heads=64, head_dim=128)
    assert dict(memory_lines(run_config(), wide, []))["KV cache of a replica"].endswith("computed again")
