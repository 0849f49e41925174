"""What setup.sh asks a virtual environment: which packages are damaged, and does everything import?

Standard library only, because it also runs in a half-installed environment.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

CPU_TRAP = ("torchaudio", "torchcodec", "torchvision")

ADVICE = {
    "torch": "The PyTorch build does not fit this machine. Remove .venv and run `make setup` again; if it fails "
    "again, give pip PyTorch's CPU wheel index through PIP_EXTRA_INDEX_URL.",
    "transformers": "If the error names torchvision::nms, a CUDA build of torchvision, torchaudio or torchcodec "
    "was installed beside a CPU torch: run `.venv/bin/python -m pip uninstall -y "
    "torchvision torchaudio torchcodec`.",
    "vllm": "vLLM does not fit the installed torch, or this CPU lacks an instruction set it needs (AVX2 at least). "
    "Compare `.venv/bin/python -m pip list` with deploy/locks/.",
    "deepspeed": "DeepSpeed does not fit the installed torch. Compare with deploy/locks/.",
    "ray": "Ray is not complete. Remove .venv and run `make setup` again.",
}
PROBES = (
    ("torch", "torch", "Tensor"),
    ("transformers", "transformers", "Qwen3ForCausalLM"),
    ("vllm", "vllm", "AsyncEngineArgs"),
    ("deepspeed", "deepspeed", "initialize"),
    ("ray", "ray.serve", "run"),
    ("e3rl", "learner", None),
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def damaged() -> list[str]:
    """Distributions whose list of files is missing, or that lack a file on it: an interrupted installation."""
    names = []
    for distribution in distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if not name:
            continue
        files = distribution.files
        if files is None or any(not Path(file.locate()).exists() for file in files if file.suffix != ".pyc"):
            names.append(canonical(name))
    return sorted(names)


def traps() -> list[str]:
    installed = {canonical(distribution.metadata["Name"] or "") for distribution in distributions()}
    return [name for name in CPU_TRAP if name in installed]


def failed_imports() -> list[str]:
    """One message, with advice, for each part that does not import."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ.update(quiet | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONWARNINGS": "ignore"})
    messages = []
    for part, module, attribute in PROBES:
        noise = io.StringIO()
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                loaded = import_module(module)
                if attribute is not None:
                    getattr(loaded, attribute)
        except Exception as error:  # an import can raise anything
            advice = ADVICE.get(part, "Run `make setup` again.")
            messages.append(f"{part} cannot be imported: {type(error).__name__}: {error}\n    {advice}")
    return messages


def main(question: str) -> int:
    if question == "damaged":
        print("\n".join(damaged()))
    elif question == "traps":
        print("\n".join(traps()))
    elif question == "imports":
        messages = failed_imports()
        print("\n".join(messages))
        return 1 if messages else 0
    else:
        print(f"unknown question {question!r}: damaged, traps or imports", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
