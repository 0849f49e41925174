"""`python -m learner.plan`: what it prints, its JSON, and what it says of bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import ConfigError, load_config
from learner.plan import main
from learner.planning.assumptions import Assumptions, read_assumptions
from learner.planning.hardware import PRESETS, read_hardware, write_hardware
from learner.planning.machine import memory_lines
from learner.planning.memory import GIB, gib
from learner.planning.shape import read_shape

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "deploy" / "configs" / "qwen3_8b_deepmath.yaml"
SHAPE = ROOT / "deploy" / "configs" / "qwen3_8b.json"
BASE = ("--config", str(CONFIG), "--model-config", str(SHAPE))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main([*BASE, *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_the_table_names_every_part_and_phase(capsys: pytest.CaptureFixture[str]):
    assert main(BASE) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in ("8,190,735,360", "AdamW moments", "KV cache", "generation", "weight sync", "saturates first:"):
        assert words in printed.out


def test_json_holds_what_the_table_shows_and_sums_up(capsys: pytest.CaptureFixture[str]):
    found = planned(capsys, "--hardware", "h200")
    memory = found["memory_bytes"]["learner_rank"]
    parts = {name: size for name, size in memory.items() if name not in ("total", "host", "optimizer step")}
    assert memory["total"] == pytest.approx(sum(parts.values()))
    replica = found["memory_bytes"]["replica_device"]
    assert sum(replica.values()) == pytest.approx(0.9 * PRESETS["h200"].gpu_memory_gib * GIB)
    seconds = found["seconds_per_step"]
    assert seconds["step"] == pytest.approx(
        seconds["generation"] + seconds["train"] + seconds["weight sync"] + seconds["driver"]
    )
    assert found["saturates_first"] in found["busy_share"] or found["saturates_first"] == "replicas: KV memory"
    assert found["problems"] == []


def test_memory_is_what_the_dry_run_shows(capsys: pytest.CaptureFixture[str]):
    config = load_config(CONFIG)
    memory = int(PRESETS["h100"].gpu_memory_gib * GIB)
    lines = dict(memory_lines(config, read_shape(config.model, SHAPE), [memory] * 8))
    found = planned(capsys)["memory_bytes"]
    assert lines["memory of a learner rank"].startswith(gib(found["learner_rank"]["total"]) + " = ")
    for name, size in found["replica_device"].items():
        assert f"{gib(size)} {name}" in lines["memory of a replica"]
    assert lines["KV cache of a replica"].startswith(f"room for {found['full_length_responses']:,} responses")


def test_counts_of_parts_are_the_command_line_s(capsys: pytest.CaptureFixture[str]):
    arguments = ("--replicas", "64", "--ranks", "64", "--transport", "nccl", "--max-staleness", "1")
    found = planned(capsys, *arguments, "--set", "rollout.groups_per_step=512", "--tensor-parallel", "2")
    assert found["setup"] | {"devices": 192, "replicas": 64, "ranks": 64, "nodes": 24} == found["setup"]
    assert found["tokens_per_step"]["committed"] == 4096 * 8192


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hardware", "h10"), "no preset: there are a100, h100, h200, b200, l40s; did you mean h100?"),
        (("--hardware", "gpu_memory_gib=80"), "--hardware begins with one of a100"),
        (("--hardware", "h100", "gpu_memory=80"), "gpu_memory: unknown setting"),
        (("--hardware", "h100", "gpu_memory_gib=-1"), "greater than or equal to 0"),
        (("--hardware", "h100", "gpu_memory_gib"), "is not of the form name=value"),
        (("--hardware", "h100", "network_gb_per_second=.inf"), "network_gb_per_second"),
        (("--assume", "train_flops_share=1.5"), "less than or equal to 1"),
        (("--assume", "train_flops=1"), "train_flops: unknown setting"),
        (("--assume", "driver_seconds_per_million_tokens=.nan"), "finite"),
        (("--ranks", "3"), "do not divide into minibatches_per_step x ranks (12 = 4 x 3)"),
        (("--ranks", "0"), "learner.ranks"),
        (("--replicas", "100000"), "rollout.engine.replicas"),
        (("--tensor-parallel", "16"), "16 > gpus_per_node"),
        (("--tensor-parallel", "0"), "--tensor-parallel: at least 1 (found 0)"),
        (("--max-staleness", "-1"), "max_staleness: Input should be greater than or equal to 0"),
        (("--set", "no.such=1"), "no: unknown setting"),
    ],
)
def test_bad_input_is_one_error_that_says_what_would_be_right(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*BASE, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err


def test_what_does_not_fit_is_planned_all_the_same(capsys: pytest.CaptureFixture[str]):
    assert main([*BASE, "--hardware", "l40s"]) == 2
    printed = capsys.readouterr()
    assert "saturates first" in printed.out
    assert "does not fit: a learner's GPU is too small" in printed.err


def test_hardware_files_are_read_back_and_changed(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    write_hardware(PRESETS["a100"], file)
    assert read_hardware([str(file)]) == PRESETS["a100"]
    changed = read_hardware([str(file), "gpu_memory_gib=40", "name=small"])
    assert (changed.name, changed.gpu_memory_gib, changed.bfloat16_tflops) == ("small", 40.0, 312.0)
    file.write_text(yaml.safe_dump({"name": "x"}))
    with pytest.raises(ConfigError, match="gpus_per_node: Field required"):
        read_hardware([str(file)])


def test_assumptions_are_changed_by_name():
    assert read_assumptions([]) == Assumptions()
    assert read_assumptions(["mean_response_tokens=4000", "signal_share=0.5"]).mean_response_tokens == 4000.0
