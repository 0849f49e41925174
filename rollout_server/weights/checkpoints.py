"""A checkpoint directory as a weight update: one safetensors file with the types that replicas hold."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from common.weights import DiskUpdate, weights_checksum
from rollout_server.weights.kept_weights import KeptWeights, write_kept
from rollout_server.weights.model_meaning import described, differences

INDEX = "model.safetensors.index.json"
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_INDEX_BYTES = 64 * 2**20

_COMPUTED = "rotary_emb.inv_freq"
"""In checkpoints of old versions of transformers; engines compute it."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of a checkpoint's tensors, by name; a tied output head is left out."""


class CheckpointRefused(Exception):
    """The directory is no checkpoint that can be loaded; the message says why, without the path."""


class OtherModel(CheckpointRefused):
    """The checkpoint is of another model than the served one."""


class NoRoom(Exception):
    """There is no room to convert a checkpoint."""


def prepare_update(
    path: str, served: dict[str, object], shapes: Shapes | None, dtype: torch.dtype
) -> tuple[DiskUpdate, KeptWeights]:
    """The update, which has no version yet, and its file, to be closed once no replica needs it any more.

    `path`: the checkpoint's directory. `served`, `shapes`: configuration and tensors of the served model, the latter
    where they are known. The checkpoint's own file is used where it fits as it is.

    Raises:
        CheckpointRefused: the directory is no checkpoint of the served model.
        NoRoom: to convert it.
    """
    try:
        directory = Path(path).expanduser()
        if not directory.is_dir():
            raise CheckpointRefused("path is not a directory with a config.json")
        config = read_config(directory)
        if found := differences(served, config):
            raise OtherModel(f"the checkpoint is of another model: {described(found)}")
        files = _weight_files(directory)
        _check_shapes(tensor_shapes(directory, config), shapes)
        tensors, fits = _read(files, config, dtype)
        kept = KeptWeights(files[0].resolve()) if fits else None
    except (OSError, RuntimeError, ValueError) as error:
        # A name that is too long or no text, a loop of links, no permission: all of them are in the request's path.
        raise CheckpointRefused(f"the checkpoint cannot be read: {_reason(error)}") from error
    if kept is None:
        try:
            kept = write_kept({name: tensor.contiguous() for name, tensor in tensors.items()})
        except (OSError, SafetensorError) as error:
            raise NoRoom(f"the weights cannot be converted: {_reason(error)}") from error
    update = DiskUpdate(
        version=0,
        path=kept.path(),
        checksum=weights_checksum(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )
    return update, kept


def _read(files: list[Path], config: dict[str, object], dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], bool]:
    """All tensors in the type that engines hold, and whether the one file that there is holds just them."""
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
                    fits = fits and tensor.dtype == dtype
                    tensors[name] = _converted(name, tensor, dtype)
    except SafetensorError as error:
        raise CheckpointRefused("a safetensors file of the checkpoint is damaged") from error
    return tensors, fits


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Refused unless all values are finite, in their own type and in `dtype`."""
    if tensor.dtype not in _TYPES:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _TYPES)
        raise CheckpointRefused(f"tensor {name} holds {tensor.dtype}; weights must be one of {kinds}")
    if not tensor.isfinite().all():
        raise CheckpointRefused(f"tensor {name} holds infinity or NaN")
    converted = tensor.to(dtype)
    if converted is not tensor and not converted.isfinite().all():
        raise CheckpointRefused(f"tensor {name} holds values that are infinite in {dtype}, which the engine holds")
    return converted


def _reason(error: Exception) -> str:
    """What went wrong, without the path."""
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def tensor_shapes(directory: Path, config: dict[str, object]) -> Shapes:
    """The tensors of a checkpoint with this configuration.

    Raises:
        CheckpointRefused: its files are missing or damaged.
    """
    shapes: Shapes = {}
    try:
        for path in _weight_files(directory):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if not _is_tied_head(name, config) and not name.endswith(_COMPUTED):
                        shapes[name] = tuple(file.get_slice(name).get_shape())
    except SafetensorError as error:
        raise CheckpointRefused("a safetensors file of the checkpoint is damaged") from error
    return shapes


def _is_tied_head(name: str, config: dict[str, object]) -> bool:
    return name == "lm_head.weight" and bool(config.get("tie_word_embeddings"))


def _check_shapes(found: Shapes, served: Shapes | None) -> None:
    """Refused with the first difference, if what the served model has is known."""
    if served is None or found == served:
        return
    for text, names in (
        ("lacks the tensor", served.keys() - found.keys()),
        ("has a tensor too many,", found.keys() - served.keys()),
        ("has another shape of", {name for name in served.keys() & found.keys() if served[name] != found[name]}),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointRefused(f"the checkpoint is of another model: it {text} {min(names)}{more}")


def read_config(directory: Path) -> dict[str, object]:
    """A model's configuration with all its defaults.

    Raises:
        CheckpointRefused: there is none.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointRefused("path is not a directory with a config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        # Transformers raises many kinds for a file that holds something else.
        raise CheckpointRefused("the checkpoint's config.json cannot be read") from error
    settings: dict[str, object] = config.get_text_config().to_dict()
    return {"architectures": config.architectures, **settings}


def _weight_files(directory: Path) -> list[Path]:
    """The files of the index if there is one, else all; never one outside of the directory."""
    index = directory / INDEX
    if index.is_file():
        try:
            if index.stat().st_size > _MOST_INDEX_BYTES:
                raise ValueError("too long")
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointRefused("the checkpoint's index is damaged") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise CheckpointRefused("the checkpoint's index names files elsewhere")
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        raise CheckpointRefused("the directory lacks safetensors files")
    return files
