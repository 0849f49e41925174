"""What is known of the model before any engine starts: is it there, how long can its sequences be."""

import re
from pathlib import Path
from typing import Any

from common.manifest import MANIFEST, DamagedError, verify_manifest
from rollout_server.http.server.command_line import UsageError
from rollout_server.http.server.settings import ServerSettings

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$", re.ASCII)


def check_model_argument(model: str) -> None:
    """Reject at once what can be no model. Imports nothing heavy.

    Raises:
        UsageError: what is wrong with `--model`.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {model}: the directory has no config.json, so it is not a model directory")
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            raise UsageError(f"--model {model}: the directory has no weights (*.safetensors)")
        return
    if path.exists():
        raise UsageError(f"--model {model} is a file; a model directory or a name on the hub is needed")
    if model.startswith((".", "/", "~")) or not _HUB_NAME.match(model):
        raise UsageError(f"--model {model}: there is no such directory")


def read_model(settings: ServerSettings) -> tuple[dict[str, Any], Any]:
    """The model's configuration, with `max_length` resolved, and its tokenizer.

    Raises:
        UsageError: the model cannot be found or read.
    """
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    source = settings.model
    if (Path(source) / MANIFEST).is_file():
        try:
            verify_manifest(Path(source))
        except DamagedError as error:
            raise UsageError(
                f"--model {source} is not what a run exported: {error}. If it was changed on purpose, delete its "
                f"{MANIFEST}"
            ) from error
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        # Transformers raises many kinds; all mean the same to who typed the name.
        line = " ".join(str(error).split())
        raise UsageError(f"--model {settings.model}: not a directory here, and not found as a model: {line}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"--model {settings.model}: its tokenizer has no tokenizer.json, which streaming needs")
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    length = settings.max_length or longest
    if length is None:
        raise UsageError(f"--model {settings.model} does not say how long its sequences can be: give --max-length")
    if longest is not None and length > longest:
        raise UsageError(f"--max-length {length} exceeds the {longest} tokens that the model was made for")
    facts = {"architectures": config.architectures, **text.to_dict(), "max_length": length, "source": source}
    return facts, tokenizer
