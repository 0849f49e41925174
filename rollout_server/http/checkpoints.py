"""A checkpoint directory as a weight update: one safetensors file with the types that replicas hold."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from common.weights import WeightUpdate, weight_checksum
from rollout_server.http.errors import bad_request

INDEX = "model.safetensors.index.json"
_SHAPING = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)

_COMPUTED = "rotary_emb.inv_freq"
"""In checkpoints of old versions of transformers; engines compute it."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a checkpoint's tensors, by name; a tied output head is left out."""


def prepare_update(
    path: str, served: dict[str, object], shapes: Shapes | None, dtype: torch.dtype, version: int
) -> tuple[WeightUpdate, Path | None]:
    """The update, and the file that was written for it, to be removed once it is not needed.

    `path`: the checkpoint's directory. `served`, `shapes`: configuration and tensors of the served model, the latter
    where they are known. The checkpoint's own file is used where it fits as it is.

    Raises:
        ApiError: 400, the directory is no checkpoint of the served model.
    """
    try:
        directory = Path(path).expanduser()
        exists = directory.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise bad_request("path cannot be a directory", "path") from error
    if not exists:
        raise bad_request("path is not a directory with a config.json", "path")
    config = read_config(directory)
    differing = [name for name in _SHAPING if config.get(name) != served.get(name)]
    if differing:
        raise bad_request(
            f"the checkpoint is of another model: its config.json differs in {', '.join(differing)}", "path"
        )
    files = _weight_files(directory)
    _check_shapes(tensor_shapes(directory, config), shapes)
    tensors: dict[str, torch.Tensor] = {}
    fits = len(files) == 1
    try:
        for one in files:
            with safe_open(one, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if _is_tied_head(name, config):
                        fits = False
                        continue
                    tensor = file.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise bad_request(f"tensor {name} holds {tensor.dtype}, which are no weights", "path")
                    if not tensor.isfinite().all():
                        raise bad_request(f"tensor {name} holds infinity or NaN", "path")
                    fits = fits and tensor.dtype == dtype
                    tensors[name] = tensor.to(dtype)
    except (SafetensorError, OSError) as error:
        raise bad_request("a safetensors file of the checkpoint is damaged", "path") from error
    written = None
    if not fits:
        with tempfile.NamedTemporaryFile(prefix="e3rl-weights-", suffix=".safetensors", delete=False) as file:
            written = Path(file.name)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, written)
    update = WeightUpdate(
        version=version,
        backend="host",
        path=str((written or files[0]).resolve()),
        checksum=weight_checksum(tensors.values()),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )
    return update, written


def tensor_shapes(directory: Path, config: dict[str, object]) -> Shapes:
    """The tensors of a checkpoint with this configuration.

    Raises:
        ApiError: 400, its files are missing or damaged.
    """
    shapes: Shapes = {}
    try:
        for path in _weight_files(directory):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not _is_tied_head(name, config) and not name.endswith(_COMPUTED):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise bad_request("a safetensors file of the checkpoint is damaged", "path") from error
    return shapes


def _is_tied_head(name: str, config: dict[str, object]) -> bool:
    return name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))


def _check_shapes(found: Shapes, served: Shapes | None) -> None:
    """400 with the first difference, if what the served model has is known."""
    if served is None or found == served:
        return
    for text, names in (
        ("lacks the tensor", served.keys() - found.keys()),
        ("has a tensor too many,", found.keys() - served.keys()),
        ("has another shape of", {name for name in served.keys() & found.keys() if served[name] != found[name]}),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise bad_request(f"the checkpoint is of another model: it {text} {min(names)}{more}", "path")


def read_config(directory: Path) -> dict[str, object]:
    """A model's configuration with all its defaults.

    Raises:
        ApiError: 400, there is none.
    """
    if not (directory / "config.json").is_file():
        raise bad_request("path is not a directory with a config.json", "path")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # Transformers raises many kinds for a file that holds something else.
        raise bad_request("the checkpoint's config.json cannot be read", "path") from error
    settings: dict[str, object] = config.get_text_config().to_dict()
    return {"architectures": config.architectures, **settings}


def _weight_files(directory: Path) -> list[Path]:
    """The files of the index if there is one, else all; never one outside of the directory."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise bad_request("the checkpoint's index is damaged", "path") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise bad_request("the checkpoint's index names files elsewhere", "path")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        raise bad_request("the directory lacks safetensors files", "path")
    return files
