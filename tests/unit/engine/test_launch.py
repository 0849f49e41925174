"""What is checked before vLLM is started."""

from pathlib import Path

import pytest

from common.config.run import ModelConfig
from rollout_server.engine.launch import check_divides
from tests.models import tiny_qwen3


def test_ranks_that_do_not_divide_the_key_value_heads_are_refused(tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_qwen3(tmp_path / "model")), max_length=64)
    for ranks in (1, 2):
        check_divides(model, ranks)
    with pytest.raises(ValueError, match=r"tensor_parallel_size \(3\) does not divide the model's \d+ key-value heads"):
        check_divides(model, 3)
