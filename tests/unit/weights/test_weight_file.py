"""The file in which weights travel: what safetensors reads back, and which damage is found."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.weights import held_sum, weights_checksum
from common.weights.weight_file import (
    DamagedWeights,
    MemoryFile,
    OpenFile,
    ParameterShape,
    WeightWriter,
    WrittenWeights,
    verify,
)

TENSORS = {
    "embed.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "norm": torch.tensor([1.0, -0.0, float("inf")], dtype=torch.bfloat16),
    "transposed": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
}


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> list[ParameterShape]:
    return [ParameterShape(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> WrittenWeights:
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with WeightWriter(OpenFile(file), shapes_of(tensors)) as writer:
            for tensor in tensors.values():
                writer.add(tensor)
            return writer.finish()
    finally:
        os.close(file)


def test_safetensors_reads_back_every_bit(tmp_path: Path) -> None:
    written = write(tmp_path / "weights", TENSORS)
    loaded = load_file(tmp_path / "weights")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert written.checksum == weights_checksum(TENSORS)
    assert (written.not_finite, written.tensors) == ("norm", 5)
    assert written.bytes == sum(t.numel() * t.element_size() for t in TENSORS.values())
    verify(tmp_path / "weights", written.checksum)


def test_a_longer_file_that_is_written_again_holds_nothing_of_before(tmp_path: Path) -> None:
    write(tmp_path / "weights", {"a": torch.ones(1000), "b": torch.ones(1000)})
    written = write(tmp_path / "weights", TENSORS)
    verify(tmp_path / "weights", written.checksum)
    assert load_file(tmp_path / "weights").keys() == TENSORS.keys()


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, position: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "weights"
    written = write(path, TENSORS)
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    place = int(position * len(data))
    data[place] ^= 1 << bit
    path.write_bytes(data)
    found = []
    for in_memory in (False, True):
        try:
            verify(path, written.checksum, in_memory=in_memory)
        except DamagedWeights:
            found.append(in_memory)
    assert len(found) in (0, 2)
    if found:
        return
    # What is of no account: blanks after the header's text, and the name of a format that nobody reads.
    assert place < header
    assert weights_checksum(load_file(path)) == written.checksum


def swapped_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["embed.weight"][[0, 1]] = tensors["embed.weight"][[1, 0]]


def swapped_tensors(tensors: dict[str, torch.Tensor]) -> None:
    tensors["q"], tensors["k"] = tensors["k"], tensors["q"]


def negated(tensors: dict[str, torch.Tensor]) -> None:
    tensors["q"] = -tensors["q"]


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["q"] = tensors["q"].reshape(2, 8)


def retyped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["q"] = tensors["q"].view(torch.int32).view(torch.float16)


@pytest.mark.parametrize("damage", [swapped_rows, swapped_tensors, negated, reshaped, retyped])
def test_the_checksum_knows_the_place_of_every_element(tmp_path: Path, damage: object) -> None:
    tensors = {"embed.weight": torch.randn(6, 4), "q": torch.randn(4, 4), "k": torch.randn(4, 4)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    sent = weights_checksum(tensors)
    assert callable(damage)
    damage(tensors)
    assert weights_checksum(tensors) != sent
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "weights")
    with pytest.raises(DamagedWeights, match="checksum"):
        verify(tmp_path / "weights", sent)
    if damage in (swapped_rows, swapped_tensors):
        # The sum of what is held does not know: engines reorder.
        assert held_sum(tensors.values()) == held_sum(before.values())


def test_the_tensor_that_differs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    written = write(path, TENSORS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedWeights, match=r"tensor scalar is not what was sent"):
        verify(path, written.checksum)


def test_a_file_that_ends_half_way_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    written = write(path, TENSORS)
    for size in (0, 4, 100, path.stat().st_size - 1):
        os.truncate(path, size)
        with pytest.raises(DamagedWeights, match="header is damaged"):
            verify(path, written.checksum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_of_what_is_held_is_the_same_however_tensors_are_joined(dtype: torch.dtype) -> None:
    q, k = torch.randn(300, 7).to(dtype), torch.randn(100, 7).to(dtype)
    expected = sum(
        int(value) for t in (q, k) for value in t.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten()
    )
    padded = torch.cat([k, q, torch.zeros(5, 7, dtype=dtype)])
    assert held_sum([q, k]) == held_sum([padded]) == held_sum([padded.t()]) == expected % 2**64
    changed = q.clone()
    changed[3, 3] += 1
    assert held_sum([changed, k]) != held_sum([q, k])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_parameter_that_is_not_finite_is_named(
    tmp_path: Path, dtype: torch.dtype, value: float | None
) -> None:
    # The sum of these overflows, but each is finite.
    tensors = {name: torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype) for name in ("a", "b", "c")}
    if value is not None:
        tensors["b"][4, 2] = tensors["c"][0, 0] = value
    assert write(tmp_path / "weights", tensors).not_finite == (None if value is None else "b")


def test_a_parameter_of_another_shape_than_announced_is_refused(tmp_path: Path) -> None:
    file = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT)
    with (
        pytest.raises(ValueError, match=r"a is torch.float32 \(3,\)"),
        WeightWriter(OpenFile(file), shapes_of({"a": torch.ones(2)})) as writer,
    ):
        writer.add(torch.ones(3))
    os.close(file)


def test_who_reads_while_it_is_written_waits_and_learns_of_a_failure(tmp_path: Path) -> None:
    file = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT)
    tensors = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}
    writer = WeightWriter(MemoryFile(file), shapes_of(tensors))
    first = writer.header_bytes + 8
    threading.Timer(0.05, lambda: writer.add(tensors["a"])).start()
    writer.wait_for(first, time.monotonic() + 10.0)
    assert os.pread(file, 8, writer.header_bytes) == tensors["a"].numpy().tobytes()
    with pytest.raises(TimeoutError):
        writer.wait_for(first + 1, time.monotonic() + 0.05)

    def gather() -> None:
        with writer:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gather()
    with pytest.raises(RuntimeError, match="could not be gathered"):
        writer.wait_for(first + 1, time.monotonic() + 10.0)
    os.close(file)


def test_the_header_holds_every_tensors_digest(tmp_path: Path) -> None:
    write(tmp_path / "weights", TENSORS)
    with safe_open(tmp_path / "weights", framework="pt") as file:
        assert file.metadata().keys() == {"format", "e3rl_digests"}
