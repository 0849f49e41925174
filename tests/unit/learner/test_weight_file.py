"""The `host` transport's file: what safetensors reads back, where it is put, and that it is removed again."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.weights import weight_checksum
from learner.weights import host as weight_file
from learner.weights.host import ParameterShape, remove_weight_files, weight_directory, write_weights

TENSORS = {
    "embed.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "norm": torch.tensor([1.0, -0.0, float("inf")], dtype=torch.bfloat16),
    "transposed": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "scalar": torch.tensor(2.5),
}


@contextmanager
def gather(name: str) -> Iterator[Tensor]:
    yield TENSORS[name]


def test_safetensors_reads_back_every_bit(tmp_path: Path) -> None:
    shapes = [ParameterShape(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]
    written = write_weights(tmp_path / "weights", shapes, gather)
    loaded = load_file(written.path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert written.checksum == weight_checksum(TENSORS.values())
    assert written.not_finite == "norm"
    assert written.bytes == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_files_of_this_process_and_of_dead_ones_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    own, dead, parent = os.getpid(), 999_999_999, os.getppid()
    for name in (
        f"e3rl-a.b-{own}-weights-v1.safetensors",
        f"e3rl-a.b-{dead}-weights-v1.safetensors",
        f"e3rl-a.b-{parent}-weights-v1.safetensors",
        f"e3rl-axb-{dead}-weights-v1.safetensors",
        "other",
    ):
        (tmp_path / name).touch()
    remove_weight_files("a.b", own)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"e3rl-a.b-{parent}-weights-v1.safetensors",
        f"e3rl-axb-{dead}-weights-v1.safetensors",
        "other",
    ]


def test_weights_that_fit_nowhere_are_refused_with_the_room_there_is() -> None:
    with pytest.raises(OSError, match=r"no room for .* MB of weights: .* MB free"):
        weight_directory(2**60)


def test_without_shared_memory_the_directory_for_temporary_files_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "_SHARED_MEMORY", tmp_path / "missing")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert weight_directory(1) == tmp_path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_parameter_that_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, value: float | None
) -> None:
    # The sum of these overflows, but each is finite.
    tensors = {name: torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype) for name in ("a", "b", "c")}
    if value is not None:
        tensors["b"][4, 2] = tensors["c"][0, 0] = value

    @contextmanager
    def gathered(name: str) -> Iterator[Tensor]:
        yield tensors[name]

    shapes = [ParameterShape(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    assert write_weights(tmp_path / "weights", shapes, gathered).not_finite == (None if value is None else "b")
