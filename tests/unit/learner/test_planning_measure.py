"""Measuring: what is fitted to an engine's steps, what a machine's figures look like, and comparison with a run."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import metrics as names
from learner.plan import main
from learner.planning import measure_run
from learner.planning.hardware import PRESETS, write_hardware
from learner.run.errors import InputError, PartError
from tests.configs import run_config

ROOT = Path(__file__).resolve().parents[3]


class Engine:
    """Takes 3 ms a step and 0.2 ms more for each response, by a clock of its own, after a second of delivery."""

    def __init__(self, short: int = 0) -> None:
        self.now = 0.0
        self.short = short
        self.closed = False

    async def start(self, config: Any, log_directory: Path) -> None: ...

    async def close(self) -> None:
        self.closed = True

    async def generate(self, groups: Any) -> Any:
        (requests,) = groups
        self.now += 1.0 + requests[0].max_tokens * (0.003 + 0.0002 * len(requests))
        for request in requests:
            yield SimpleNamespace(generated_tokens=request.max_tokens - self.short)


def test_an_engine_s_step_is_told_from_the_time_around_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    engine: Any = Engine()
    monkeypatch.setattr(measure_run, "time", SimpleNamespace(perf_counter=lambda: engine.now))
    alone, together = asyncio.run(measure_run._steps(engine, run_config(), tmp_path))
    assert alone == pytest.approx(0.0032)
    assert together == pytest.approx(0.003 + measure_run.TOGETHER * 0.0002)
    assert engine.closed


def test_responses_of_another_length_are_not_measured(tmp_path: Path):
    engine: Any = Engine(short=1)
    with pytest.raises(PartError, match="a response of 72 tokens was asked for, one of 71 came"):
        asyncio.run(measure_run._steps(engine, run_config(), tmp_path))
    assert engine.closed
    short = run_config(rollout={"max_response_tokens": 8, "erasure": {"segmentation": {"mode": "fixed", "length": 8}}})
    with pytest.raises(InputError, match=r"max_response_tokens \(8\) is too short"):
        asyncio.run(measure_run._steps(engine, short, tmp_path))


def test_a_plan_is_compared_with_a_run_of_its_own_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = [
        {
            names.GENERATED_TOKENS: 512 * 1000 + 512 * 250,
            names.ERASED_TOKENS: 512 * 250,
            names.RESPONSE_TOKENS: 1000.0,
            names.SKIPPED_SHARE: 0.5,
            names.LEARNER_TOKENS: 256 * 1100.0,
            names.PADDING_SHARE: 0.0,
            names.ROLLOUT_SECONDS: 10.0 + number,
            names.TRAIN_SECONDS: 20.0,
            names.SYNC_SECONDS: 1.0,
            names.STEP_SECONDS: 31.0 + number,
            names.TOKENS_PER_SECOND: 100.0,
            names.SYNC_BYTES: 2 * 8_190_735_360,
            names.LEARNER_MEMORY: 50.0 + number,
        }
        for number in (100, 0, 1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    hardware = tmp_path / "here.yaml"
    write_hardware(PRESETS["h100"], hardware)
    config = ROOT / "deploy" / "configs" / "qwen3_8b_deepmath.yaml"
    shape = ROOT / "deploy" / "configs" / "qwen3_8b.json"
    arguments = ["--config", str(config), "--model-config", str(shape), "--hardware", str(hardware)]
    assert main([*arguments, "--against", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumptions"]["mean_prompt_tokens"] == pytest.approx(100.0)
    compared = {row["name"]: row for row in found["compared"]}
    # The first step is left out.
    assert compared["generation, seconds"]["measured"] == 11.0
    assert compared["generated tokens of a step"]["planned"] == pytest.approx(512 * 1250)
    assert compared["weights, bytes"]["planned"] == compared["weights, bytes"]["measured"]
    assert compared["learner rank, GiB at its peak"]["measured"] == 52.0
    (tmp_path / "metrics.jsonl").write_text(json.dumps(steps[0]) + "\n")
    assert main([*arguments, "--against", str(tmp_path)]) == 2
    assert "has 1 step(s), at least 3 are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--measure", "/no/such/place/here.yaml"), "can't be written"),
        (("--measure-engine", "--config", "x.yaml"), "--measure-engine goes with --measure FILE"),
        (("--against", "/no/such/run"), "No such file"),
        ((), "--config FILE is needed"),
    ],
)
def test_what_can_not_be_measured_or_compared_is_told(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
