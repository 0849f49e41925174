"""The sending side of `host`: one file in shared memory, which every replica on this machine maps."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.machine import boot_id
from common.owned_directories import OwnedDirectory, remove_leftovers
from common.weights.updates import HostUpdate
from common.weights.weight_file import MemoryFile, WeightWriter, WrittenWeights
from learner.weights.publisher import Parameters

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "e3rl-weights-"


class HostPublisher:
    """Implements `Publisher`. A file whose version nobody needs any more is written again: its memory is there."""

    def __init__(self) -> None:
        self._directories: dict[Path, OwnedDirectory] = {}
        self._files: dict[int, _File] = {}
        self._writers: dict[int, WeightWriter] = {}
        self._spare: _File | None = None
        remove_weight_leftovers()

    def begin(self, version: int, parameters: Parameters) -> HostUpdate:
        self.discard(version)
        one = self._files[version] = self._new_file(version, parameters.bytes)
        self._writers[version] = WeightWriter(one.memory, parameters.shapes)
        state = os.fstat(one.memory.file)
        return HostUpdate(
            version=version,
            checksum="",
            bytes=parameters.bytes,
            path=str(one.path),
            boot_id=boot_id(),
            file_id=(state.st_dev, state.st_ino),
        )

    def publish(self, version: int, parameters: Parameters) -> WrittenWeights:
        with self._writers.pop(version) as writer:
            for _, tensor in parameters:
                writer.add(tensor)
            return writer.finish()

    def keep_only(self, version: int) -> None:
        for other in [other for other in self._files if other != version]:
            self._retire(other)

    def discard(self, version: int) -> None:
        self._writers.pop(version, None)
        if version in self._files:
            self._retire(version)

    def close(self) -> None:
        for one in (*self._files.values(), *((self._spare,) if self._spare else ())):
            os.close(one.memory.file)
        for directory in self._directories.values():
            directory.remove()
        self._files.clear()
        self._writers.clear()
        self._directories.clear()
        self._spare = None

    def _new_file(self, version: int, size: int) -> "_File":
        name = f"v{version}.safetensors"
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return _File(spare.path.rename(spare.path.with_name(name)), spare.memory)
        parent = weight_directory(size)
        if parent not in self._directories:
            self._directories[parent] = OwnedDirectory(PREFIX, parent)
        directory = self._directories[parent]
        return _File(directory.path / name, MemoryFile(directory.create(name)))

    def _retire(self, version: int) -> None:
        """Its name is gone at once. One such file is kept to be written again."""
        one = self._files.pop(version)
        if self._spare is None:
            self._spare = _File(one.path.rename(one.path.with_name("spare")), one.memory)
        else:
            one.path.unlink()
            os.close(one.memory.file)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    memory: MemoryFile


def remove_weight_leftovers() -> None:
    """Remove what processes of this user have left here that are gone."""
    remove_leftovers(PREFIX, weight_directories())


def weight_directory(needed_bytes: int) -> Path:
    """Shared memory if it has room, else the directory for temporary files. Raises OSError if neither has.

    Containers often give shared memory 64 MB only.
    """
    candidates = [d for d in weight_directories() if os.access(d, os.W_OK)]
    free = {directory: shutil.disk_usage(directory).free for directory in candidates}
    for directory in candidates:
        if free[directory] > needed_bytes + 2**20:
            return directory
    room = ", ".join(f"{directory} has {size / 2**20:,.0f} MB free" for directory, size in free.items())
    raise OSError(f"no room for {needed_bytes / 2**20:,.0f} MB of weights: {room}")


def weight_directories() -> list[Path]:
    """Where weights may lie."""
    return [SHARED_MEMORY, Path(tempfile.gettempdir())]
