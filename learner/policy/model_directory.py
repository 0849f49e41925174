"""The policy's model directory and tokenizer: made if it is the demo's, and checked before anything starts."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config.data import ChainData
from common.config.run import RunConfig
from common.manifest import MANIFEST, DamagedError, verify_manifest
from common.sentinels import NoSentinelsError, model_sentinels
from learner.run.errors import InputError

log = logging.getLogger(__name__)

CONFIG = "config.json"
_HEADER_BYTES = 8


def ensure_model(config: RunConfig, on_step: Callable[[str, int, int], None]) -> None:
    """Make the demo's warm-started model at `model.path` if the configuration asks for it and it is not there.

    `on_step` gets the phase, the finished and the total number of steps. Raises InputError if the path is taken, also
    by a model that was made for chains of another length.
    """
    if not config.model.warm_start:
        return
    from learner.warm_start import WarmStartSettings, warm_start

    path = Path(config.model.path)
    if (path / CONFIG).is_file():
        return
    length = config.data.length if isinstance(config.data, ChainData) else None
    settings = WarmStartSettings() if length is None else WarmStartSettings(chain_length=length)
    done, total = 0, settings.clean_steps + settings.slip_steps

    def count(phase: str) -> None:
        nonlocal done
        done += 1
        on_step(phase, done, total)

    try:
        warm_start(path, settings, on_step=count)
    except FileExistsError as error:
        raise InputError(f"model.path: {path} exists and is no model directory (no {CONFIG}): {error}") from error


def is_made_first(config: RunConfig) -> bool:
    """Whether the run makes its model itself, before anything else."""
    return config.model.warm_start and not (Path(config.model.path) / CONFIG).is_file()


def is_hub_name(name: str) -> bool:
    """Whether a model's path is no directory here but may be a name on the Hugging Face hub."""
    return not Path(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def check_model(config: RunConfig) -> None:
    """Raise InputError if `model.path` is no model directory and no name on the hub. Reads no weights."""
    model = config.model
    if Path(model.path).exists():
        check_directory(Path(model.path))
        if model.warm_start and isinstance(config.data, ChainData):
            _check_chain_length(Path(model.path), config.data.length)
    elif not is_hub_name(model.path):
        raise InputError(f"model.path: there is no directory {model.path}, and it is no Hugging Face hub name")


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer, once the model is known to be usable, sentinels included; no weights are loaded.

    Raises InputError that says what is wrong.
    """
    model = config.model
    path = Path(model.path)
    check_model(config)
    if (path / MANIFEST).is_file():
        try:
            verify_manifest(path)
        except DamagedError as error:
            raise InputError(
                f"model.path: {path} is not what a run exported: {error}. If it was changed on purpose, delete its "
                f"{MANIFEST}"
            ) from error
    import transformers

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        model_config = transformers.AutoConfig.from_pretrained(model.path, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model.path, **options)
    except Exception as error:
        # transformers raises many kinds for files that are missing, damaged or of an unknown model.
        message = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"model.path: {model.path} can't be loaded: {message}") from error
    text_config = model_config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and model.max_length > longest:
        raise InputError(
            f"model.max_length ({model.max_length}) exceeds the {longest} positions that the model {model.path} has"
        )
    try:
        sentinels = model_sentinels(model)
    except NoSentinelsError as error:
        raise InputError(f"model.path: {model.path} can't be used: {error}") from error
    log.info("sentinels: %s", sentinels)
    return tokenizer


def _check_chain_length(path: Path, length: int) -> None:
    from learner.warm_start import chain_length_of

    made_for = chain_length_of(path)
    if made_for is not None and made_for != length:
        raise InputError(
            f"model.path: {path} was made for chains of {made_for} steps, data.length is {length}: name another "
            "path, or set model.warm_start to false to train it all the same"
        )


def check_directory(path: Path) -> None:
    """Raise InputError unless `path` holds a model's configuration and whole weight files."""
    if not path.is_dir():
        raise InputError(f"model.path: {path} is a file; a Hugging Face model directory is needed")
    if not (path / CONFIG).is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        raise InputError(f"model.path: {path} is no Hugging Face model directory: no {CONFIG}; it holds {found}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights and not list(path.glob("*.bin")):
        raise InputError(f"model.path: {path} has no weights (*.safetensors)")
    for file in weights:
        read_header(file)


def read_header(file: Path) -> dict[str, Any]:
    """A safetensors file's description of its tensors. Raises InputError if the file is not as long as that says.

    A download that was cut short is shorter.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(_HEADER_BYTES))
            if header_bytes > size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = _HEADER_BYTES + header_bytes + max(ends, default=0)
    except (OSError, struct.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model.path: {file} is not a safetensors file: {error}") from error
    if size != expected:
        raise InputError(f"model.path: {file} is damaged: {size} bytes, its header says {expected}")
    return header


def with_absolute_model(config: RunConfig) -> RunConfig:
    """For Ray's actors, whose working directories may be others than the driver's. A name on the hub stays as it is."""
    path = Path(config.model.path)
    if not path.is_dir():
        return config
    model = config.model.model_copy(update={"path": str(path.absolute())})
    return config.model_copy(update={"model": model})
