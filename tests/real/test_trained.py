"""A short training run of the pretrained model, through the documented command line."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import metrics as names
from tests.http_server import ROOT

RUN_SECONDS = 900
STEPS = 2
EXAMPLES = ((5, 9, 3), (8, 2, 7), (7, 6, 5), (1, 8, 2))


def solution(a: int, b: int, c: int) -> str:
    return f"{a} + {b} = {a + b}\n{a + b} + {c} = {a + b + c}\nAnswer: {a + b + c}\n"


def rows(count: int, seed: int) -> str:
    """Sums of three numbers, with examples in the prompt, since the model is small."""
    draw = random.Random(seed)
    shots = "\n".join(f"Q: {a} + {b} + {c}\n{solution(a, b, c)}" for a, b, c in EXAMPLES)
    lines = []
    for _ in range(count):
        a, b, c = (draw.randint(1, 9) for _ in range(3))
        lines.append(json.dumps({"question": f"{shots}\nQ: {a} + {b} + {c}\n", "answer": str(a + b + c)}))
    return "\n".join(lines) + "\n"


@pytest.mark.timeout(RUN_SECONDS + 60)
def test_two_steps_of_training(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(32, seed=1))
    (tmp_path / "test.jsonl").write_text(rows(4, seed=2))
    settings: dict[str, Any] = {
        "name": "real",
        "runs_directory": str(tmp_path / "runs"),
        "preset": "pretrained",
        "steps": STEPS,
        "model": {"path": str(smollm2), "max_length": 256},
        "data": {
            "source": "file",
            "train_path": str(tmp_path / "train.jsonl"),
            "test_path": str(tmp_path / "test.jsonl"),
            "chat": False,
        },
        "reward": {"kind": "function", "function": "tests.user_rewards:first_answer"},
        "rollout": {
            "groups_per_step": 4,
            "responses_per_group": 4,
            "max_prompt_tokens": 190,
            "max_response_tokens": 32,
            "group_share": {"mode": "fixed", "share": 0.5},
            "erasure": {"segmentation": {"mode": "delimiter", "min_length": 4, "max_length": 16}},
            "engine": {"threads": 1, "max_concurrent_responses": 16},
        },
        "learner": {
            "ranks": 1,
            "minibatches_per_step": 1,
            "tokens_per_microbatch": 1024,
            "optimizer": {"learning_rate": 1e-5, "warmup_steps": 1},
        },
        "evaluation": {"problems": 4, "responses_per_problem": 2},
        "checkpoint": {"every_steps": 2, "keep": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    ended = subprocess.run(
        [sys.executable, "-m", "learner.train", "--config", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs" / "real" / "metrics.jsonl").read_text().splitlines()]
    assert [line[names.STEP] for line in lines] == list(range(1, STEPS + 1))
    shown = (names.REWARD_MEAN, names.ERASE_RATE, names.LOSS, names.GRADIENT_NORM, names.LOGPROB_GAP_MAX)
    for line in lines:
        print({name: line[name] for name in (*shown, names.STEP_SECONDS)})
        assert math.isfinite(line[names.LOSS])
        assert line[names.LOGPROB_GAP_MAX] < 1e-4
    assert any(line[names.GRADIENT_NORM] > 0.0 for line in lines)
    assert sum(line[names.ERASURES] for line in lines) > 0
    assert (tmp_path / "runs" / "real" / "policy" / "model.safetensors").is_file()
