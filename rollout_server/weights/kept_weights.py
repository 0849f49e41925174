"""Weights of a checkpoint, kept for as long as a replica may have to load them again.

An open file keeps its content when its directory is deleted, and other processes of the same user on this host reach it
through `/proc`. Nothing is left of it when this process ends, however it ends.
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.owned_directories import OwnedDirectory, remove_leftovers

_PREFIX = "e3rl-checkpoint-"


class KeptWeights:
    """A safetensors file, open; `written`: it was made for this purpose and has no name any more."""

    def __init__(self, path: Path, written: bool = False) -> None:
        self._file = path.open("rb")
        self._path = path
        self._written = written

    def path(self) -> str:
        """Where replicas find the file now: its own name, which other hosts may see too, for as long as it has it."""
        if not self._written:
            try:
                if os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
                    return str(self._path)
            except OSError:
                pass
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def close(self) -> None:
        self._file.close()


def write_kept(tensors: dict[str, torch.Tensor]) -> KeptWeights:
    """Weights in a file of their own, in the directory for temporary files. Raises `OSError`."""
    remove_kept_leftovers()
    directory = OwnedDirectory(_PREFIX, Path(tempfile.gettempdir()))
    try:
        path = directory.path / "weights.safetensors"
        save_file(tensors, path)
        return KeptWeights(path, written=True)
    finally:
        directory.remove()


def remove_kept_leftovers() -> None:
    """Remove what processes have left that were killed while they wrote."""
    remove_leftovers(_PREFIX, [Path(tempfile.gettempdir())])
