"""Checkpoints as weight updates: what is refused, always with 400, and what is kept of one that is deleted."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.owned_directories import OwnedDirectory
from common.weights import weights_checksum
from rollout_server.weights import kept_weights
from rollout_server.weights.checkpoints import (
    INDEX,
    CheckpointRefused,
    Shapes,
    prepare_update,
    read_config,
    tensor_shapes,
)
from rollout_server.weights.kept_weights import KeptWeights, remove_kept_leftovers
from tests.models import tiny_llama

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("served") / "model", seed=0)


@pytest.fixture
def checkpoint(served: Path, tmp_path: Path) -> Path:
    """A copy of the served model, to be changed."""
    shutil.copytree(served, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def prepare(path: Path | str, served: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, KeptWeights]:
    config = read_config(served)
    shapes: Shapes = tensor_shapes(served, config)
    return prepare_update(str(path), config, shapes, dtype)


def refused(path: Path | str, served: Path, dtype: torch.dtype = torch.float32) -> str:
    """The message."""
    with pytest.raises(CheckpointRefused) as error:
        prepare(path, served, dtype)
    assert len(str(error.value)) < 1000
    return str(error.value)


def change_config(checkpoint: Path, **values: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


MEANINGS: list[tuple[dict[str, Any], str, str]] = [
    ({"rms_norm_eps": 0.5}, "rms_norm_eps", "0.5"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "rope_theta", "77.0"),
    ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings", "True"),
    ({"num_attention_heads": 1}, "num_attention_heads", "1"),
    ({"attention_bias": True}, "attention_bias", "True"),
    ({"max_position_embeddings": 7}, "max_position_embeddings", "7"),
    ({"sliding_window": 8}, "sliding_window", "8"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "factor", "2.0"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "architectures", "Qwen3ForCausalLM"),
    ({"model_type": "mistral"}, "model_type", "'mistral'"),
]


@pytest.mark.parametrize(("values", "name", "value"), MEANINGS, ids=[name for _, name, _ in MEANINGS])
def test_a_configuration_that_means_something_else_is_refused_with_both_values(
    served: Path, checkpoint: Path, values: dict[str, Any], name: str, value: str
) -> None:
    change_config(checkpoint, **values)
    message = refused(checkpoint, served)
    assert name in message
    assert value in message
    assert " here and " in message


def test_what_means_nothing_may_differ(served: Path, checkpoint: Path) -> None:
    change_config(
        checkpoint,
        dtype="bfloat16",
        transformers_version="4.0",
        use_cache=False,
        pad_token_id=1,
        eos_token_id=[1, 2],
        attention_dropout=0.5,
        _name_or_path="elsewhere",
        architectures=None,
    )
    update, kept = prepare(checkpoint, served)
    assert update.checksum == weights_checksum(load_file(checkpoint / WEIGHTS))
    kept.close()


def _overflows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double().fill_(1e300)


def _float8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


def _complex(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.complex64)


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def _booleans(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bool()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = torch.nan


def _lacks(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


VALUES = {
    "float64 that overflows": (_overflows, "infinite in torch.float32"),
    "float8": (_float8, "torch.float8_e4m3fn"),
    "complex": (_complex, "torch.complex64"),
    "integers": (_integers, "torch.int8"),
    "booleans": (_booleans, "torch.bool"),
    "NaN": (_nan, "infinity or NaN"),
    "a tensor too few": (_lacks, "lacks the tensor"),
}


@pytest.mark.parametrize("kind", list(VALUES))
def test_tensors_that_the_engine_cannot_hold_are_refused_by_name(served: Path, checkpoint: Path, kind: str) -> None:
    change, text = VALUES[kind]
    change_weights(checkpoint, change)
    message = refused(checkpoint, served)
    assert "model.norm.weight" in message
    assert text in message


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 70000.0), (torch.bfloat16, 3.4e38)])
def test_float32_that_overflows_in_the_engines_type_is_refused(
    served: Path, checkpoint: Path, dtype: torch.dtype, value: float
) -> None:
    change_weights(checkpoint, lambda tensors: tensors["model.norm.weight"].fill_(value))
    assert f"infinite in {dtype}" in refused(checkpoint, served, dtype)


def indexed(names: Any) -> Callable[[Path], Path]:
    """A checkpoint whose index names these files."""

    def make(checkpoint: Path) -> Path:
        text = names if isinstance(names, str) else json.dumps({"weight_map": dict(enumerate(names))})
        (checkpoint / INDEX).write_text(text)
        return checkpoint

    return make


def _cut(checkpoint: Path) -> Path:
    path = checkpoint / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return checkpoint


def _header(length: int) -> Callable[[Path], Path]:
    def make(checkpoint: Path) -> Path:
        (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}")
        return checkpoint

    return make


def _sparse(checkpoint: Path) -> Path:
    """A tensor of a terabyte in a file of a few kilobytes."""
    size = 2**40
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"model.norm.weight": entry}).encode()
    with (checkpoint / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return checkpoint


def _loop(checkpoint: Path) -> Path:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).symlink_to(WEIGHTS)
    return checkpoint


def _directory(checkpoint: Path) -> Path:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / WEIGHTS).mkdir()
    return checkpoint


def _pipe(checkpoint: Path) -> Path:
    (checkpoint / "config.json").unlink()
    os.mkfifo(checkpoint / "config.json")
    return checkpoint


def _deep_config(checkpoint: Path) -> Path:
    (checkpoint / "config.json").write_text('{"a":' * 200_000)
    return checkpoint


BROKEN: dict[str, Callable[[Path], Path | str]] = {
    "deep index": indexed('{"weight_map":' * 200_000),
    "index of numbers": indexed([1]),
    "index of lists": indexed([["a"]]),
    "index is a list": indexed("[]"),
    "index is not text": lambda path: (path / INDEX).write_bytes(b"\xff\xfe{}") and path,
    "index names files elsewhere": indexed(["../model.safetensors"]),
    "index names the parent": indexed([".."]),
    "index names an absolute path": indexed(["/etc/passwd"]),
    "index names nothing": indexed([""]),
    "index names a long name": indexed(["x" * 5000]),
    "index names a surrogate": indexed(["\ud800.safetensors"]),
    "index names NUL": indexed(["a\0b"]),
    "cut off": _cut,
    "huge header": _header(2**62),
    "header beyond the end": _header(10_000),
    "a terabyte": _sparse,
    "loop of links": _loop,
    "pipe": _pipe,
    "deep configuration": _deep_config,
    "weights are a directory": _directory,
    "long path": lambda path: "/" + "x" * 4000,
    "long name": lambda path: str(path / ("x" * 300)),
    "NUL": lambda path: f"{path}\0",
    "surrogate": lambda path: f"{path}\ud800",
    "unknown home": lambda path: "~nobody-has-this-name/model",
    "file": lambda path: path / "config.json",
    "empty directory": lambda path: path.parent,
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_what_is_no_checkpoint_is_a_400_and_says_nothing_of_the_servers_files(
    served: Path, checkpoint: Path, kind: str
) -> None:
    message = refused(BROKEN[kind](checkpoint), served)
    assert str(checkpoint) not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as it is", "converted"])
def test_weights_outlive_their_checkpoint(served: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    before = set(Path(kept_weights.tempfile.gettempdir()).glob("e3rl-checkpoint-*"))
    update, kept = prepare(checkpoint, served, dtype)
    assert (kept.path() == str(checkpoint / WEIGHTS)) == (dtype == torch.float32)
    shutil.rmtree(checkpoint)
    script = "import sys; from safetensors import safe_open; print(len(list(safe_open(sys.argv[1], 'pt').keys())))"
    seen = subprocess.run([sys.executable, "-c", script, kept.path()], capture_output=True, text=True, check=True)
    assert int(seen.stdout) == len(tensors), "another process reads it"
    with safe_open(kept.path(), framework="pt") as file:
        assert weights_checksum({name: file.get_tensor(name) for name in file.keys()}) == update.checksum  # noqa: SIM118
    assert set(Path(kept_weights.tempfile.gettempdir()).glob("e3rl-checkpoint-*")) == before, "nothing lies about"
    kept.close()


def test_another_file_in_the_checkpoints_place_is_not_taken_for_it(served: Path, checkpoint: Path) -> None:
    update, kept = prepare(checkpoint, served)
    replacement = checkpoint / "new"
    save_file({"a": torch.zeros(1)}, replacement)
    replacement.rename(checkpoint / WEIGHTS)
    with safe_open(kept.path(), framework="pt") as file:
        assert weights_checksum({name: file.get_tensor(name) for name in file.keys()}) == update.checksum  # noqa: SIM118
    kept.close()


def test_what_a_killed_server_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_weights.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "e3rl-checkpoint-abandoned").mkdir()
    owned = OwnedDirectory("e3rl-checkpoint-", tmp_path)
    remove_kept_leftovers()
    assert list(tmp_path.iterdir()) == [owned.path]
    owned.remove()
