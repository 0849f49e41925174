"""Digests: whatever changes in a directory's files is noticed before they are read."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import manifest
from common.config.run import RunConfig
from common.manifest import MANIFEST, DamagedError, verify_manifest, write_manifest
from learner.policy.model_directory import load_tokenizer
from learner.run.errors import InputError
from tests.configs import run_config
from tests.models import tiny_qwen3

NAMES = ("driver.json", "learner/learner.json", "learner/deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", MANIFEST)


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """So that files of a few kilobytes have several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "CHUNK_BYTES", 1000)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    for size, name in zip((120, 90, 5000), NAMES, strict=False):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(size).randbytes(size))
    (directory / "learner" / "empty").touch()
    write_manifest(directory)
    return directory


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(before)


def test_what_was_written_is_whole(written: Path, tmp_path: Path) -> None:
    verify_manifest(written)
    shutil.copytree(written, tmp_path / "copy")
    verify_manifest(tmp_path / "copy")


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_noticed(written: Path, name: str, place: float, bit: int) -> None:
    path = written / name
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    if name == MANIFEST and _same_json(bytes(data), path.read_bytes()):
        return
    with changed(path, bytes(data)), pytest.raises(DamagedError, match=Path(name).name.replace(".", r"\.")):
        verify_manifest(written)


def _same_json(one: bytes, other: bytes) -> bool:
    """White space between values, for another."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), length=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_is_noticed(written: Path, name: str, length: float) -> None:
    path = written / name
    data = path.read_bytes()
    cut = data[: int(length * len(data))]
    if name == MANIFEST and _same_json(cut, data):
        return
    with changed(path, cut), pytest.raises(DamagedError):
        verify_manifest(written)


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 4), second=st.integers(0, 4))
def test_chunks_that_changed_places_are_noticed(written: Path, first: int, second: int) -> None:
    path = written / NAMES[2]
    data = path.read_bytes()
    chunks = [data[start : start + 1000] for start in range(0, 5000, 1000)]
    chunks[first], chunks[second] = chunks[second], chunks[first]
    if first == second:
        return
    with changed(path, b"".join(chunks)), pytest.raises(DamagedError, match="digest differs"):
        verify_manifest(written)


@pytest.mark.parametrize("name", [*NAMES, "learner/empty"])
def test_a_missing_file_is_named(written: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(written, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(DamagedError, match=Path(name).name):
        verify_manifest(tmp_path / "copy")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3, "digest": ""}', '{"files": {}, "digest": 1}', "\xff"])
def test_a_manifest_that_is_none_is_no_error_of_another_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(DamagedError, match=MANIFEST):
        verify_manifest(tmp_path)


def test_an_exported_model_that_was_damaged_is_not_trained(tmp_path: Path) -> None:
    model = tiny_qwen3(tmp_path / "model", max_length=256, hidden_size=16)
    write_manifest(model)
    settings: RunConfig = run_config(model={"path": str(model), "max_length": 256})
    load_tokenizer(settings)
    weights = next(model.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-10] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"is not what a run exported: .*safetensors is not what was written"):
        load_tokenizer(settings)
