"""What is refused before a run begins, and what a run that could not begin leaves behind: nothing."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError, RunConfig
from common.manifest import write_manifest
from learner.environments.data import read_rows, rows_digest
from learner.loop.driver_state import DriverState, save_state
from learner.run.errors import InputError
from learner.run.run_directory import RunDirectory
from learner.run.training_run import compare, train
from tests.configs import run_config


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    """A configuration with a model directory that looks whole and whose tokenizer can't be read."""
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    header = b"{}"
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return run_config(**{"runs_directory": str(tmp_path / "runs"), "model": {"path": str(model)}} | changes)


def test_a_model_that_is_not_there_is_refused_before_the_data_is_read(tmp_path: Path):
    data = {"source": "file", "train_path": str(tmp_path / "nowhere.jsonl"), "test_path": str(tmp_path / "n.jsonl")}
    with pytest.raises(InputError, match=r"model\.path: there is no directory"):
        train(config(tmp_path, model={"path": str(tmp_path / "nowhere")}, data=data), resume=False)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_can_not_begin_leaves_no_directory_and_no_process(tmp_path: Path):
    reward = {"kind": "function", "function": "tests.user_rewards:length"}
    with pytest.raises(InputError, match=r"model\.path: .* can't be loaded"):
        train(config(tmp_path, reward=reward), resume=False)
    assert multiprocessing.active_children() == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_prompts_that_the_chain_reward_can_not_check_are_refused_before_anything_starts(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a+5:1", "answer": ""}\n{"question": "What is 1 + 1?", "answer": "2"}\n')
    data = {"source": "file", "train_path": str(rows), "test_path": str(rows)}
    with pytest.raises(
        InputError, match=r"1 of 2 rows .*reward\.kind 'chain' can't check it: not a chain prompt.* \(line 2\)"
    ):
        train(config(tmp_path, data=data), resume=False)
    assert not (tmp_path / "runs").exists()


def test_prompts_without_an_answer_are_refused_where_the_reward_compares_answers(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    answers = ["2", r"$\boxed{}$", "", " ", r"\frac{1}{2}"]
    rows.write_text("".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in answers))
    data = {"source": "file", "train_path": str(rows), "test_path": str(rows)}
    with pytest.raises(InputError, match=r"3 of 5 rows .*needs an answer, and it is empty \(line 2, line 3, line 4\)"):
        train(config(tmp_path, data=data, reward={"kind": "math"}), resume=False)
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 2?", "answer": "3"}\n')
    data = {"source": "file", "train_path": str(rows), "test_path": str(rows), "chat": False}
    reward = {"kind": "function", "function": "tests.user_rewards:length"}
    planned = config(tmp_path, data=data, reward=reward)
    directory = RunDirectory.create(planned)
    digest = rows_digest([*read_rows(planned, "train"), *read_rows(planned, "test")])
    directory.checkpoint(1).mkdir()
    save_state(directory.checkpoint(1), DriverState(step=1, data=digest))
    write_manifest(directory.checkpoint(1))
    directory.close()
    # The same data gets past this check, to the model, which is not there.
    with pytest.raises(InputError, match=r"model\.path"):
        train(planned, resume=True)
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "1 + 3?", "answer": "4"}\n')
    with pytest.raises(InputError, match=r"the data is not what .* was trained on so far"):
        train(planned, resume=True)
    assert directory.checkpoint_steps() == [1]


def test_what_can_not_be_resumed_or_forked_is_refused_before_the_data_is_read(tmp_path: Path):
    data = {"source": "file", "train_path": str(tmp_path / "nowhere.jsonl"), "test_path": str(tmp_path / "n.jsonl")}
    directory = RunDirectory.create(config(tmp_path, data=data))
    directory.checkpoint(1).mkdir()
    save_state(directory.checkpoint(1), DriverState(step=1))
    write_manifest(directory.checkpoint(1))
    directory.close()
    with pytest.raises(InputError, match=r"seed: 0 in the run, 1 now"):
        train(config(tmp_path, data=data, seed=1), resume=True)
    with pytest.raises(InputError, match=r"(?s)can't be continued.*learner\.ranks: 1 in the run, 2 now$"):
        train(
            config(tmp_path, name="new", data=data, seed=1, learner={"ranks": 2}), resume=False, source=directory.path
        )
    with pytest.raises(InputError, match=r"holds no run to fork"):
        train(config(tmp_path, name="new", data=data), resume=False, source=tmp_path / "other")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        train(config(tmp_path, name="new", data=data, seed=1), resume=False, source=directory.path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["test"]


def test_a_fork_that_can_not_begin_leaves_no_directory(tmp_path: Path):
    directory = RunDirectory.create(config(tmp_path))
    directory.checkpoint(1).mkdir()
    save_state(directory.checkpoint(1), DriverState(step=1))
    write_manifest(directory.checkpoint(1))
    directory.close()
    with pytest.raises(InputError, match=r"model\.path"):
        train(config(tmp_path, name="new"), resume=False, source=directory.path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["test"]


def test_a_comparison_needs_learning_rates_that_do_not_depend_on_the_number_of_steps(tmp_path: Path):
    with pytest.raises(InputError, match="constant, not cosine"):
        compare(config(tmp_path, learner={"optimizer": {"schedule": "cosine"}}), resume=False)
    assert not (tmp_path / "runs").exists()


def test_a_comparison_whose_baselines_can_not_run_is_refused_before_the_run(tmp_path: Path):
    (tmp_path / "runs" / "test-grpo" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="test-grpo already holds a run"):
        compare(config(tmp_path), resume=False)
    with pytest.raises(ConfigError, match=r"name: .* at most 100 characters"):
        compare(config(tmp_path, name="n" * 90), resume=False)
