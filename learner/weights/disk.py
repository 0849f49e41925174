"""The sending side of `disk`: one file in a directory that every machine sees.

A file appears under its name when it is complete and on the disk. It stays until every replica holds a later version.
"""

import errno
import os
import shutil
from pathlib import Path

from common.machine import boot_id
from common.owned_directories import OwnedDirectory, remove_leftovers
from common.weights.updates import DiskUpdate
from common.weights.weight_file import OpenFile, WeightWriter, WrittenWeights
from learner.weights.publisher import Parameters

PREFIX = "e3rl-weights-"
UNTOUCHED_SECONDS = 86400.0
"""Not every shared file system shows one machine the locks of another: what another left is removed after so long."""


class DiskPublisher:
    """Implements `Publisher`. `directory`: `sync.directory`, made if it is not there."""

    def __init__(self, directory: Path) -> None:
        self._shared = directory.expanduser().resolve()
        self._shared.mkdir(parents=True, exist_ok=True)
        here = f"{PREFIX}{boot_id()[:8]}-"
        remove_leftovers(here, [self._shared])
        remove_leftovers(PREFIX, [self._shared], untouched_seconds=UNTOUCHED_SECONDS)
        self._directory = OwnedDirectory(here, self._shared)
        self._writers: dict[int, tuple[WeightWriter, int]] = {}
        self._versions: set[int] = set()

    def begin(self, version: int, parameters: Parameters) -> DiskUpdate:
        self.discard(version)
        free = shutil.disk_usage(self._shared).free
        if free < parameters.bytes:
            raise OSError(errno.ENOSPC, _no_room(self._shared, parameters.bytes, free))
        file = self._directory.create(self._partial(version).name)
        self._writers[version] = WeightWriter(OpenFile(file), parameters.shapes), file
        return DiskUpdate(version=version, checksum="", bytes=parameters.bytes, path=str(self._complete(version)))

    def publish(self, version: int, parameters: Parameters) -> WrittenWeights:
        writer, file = self._writers[version]
        try:
            with writer:
                for _, tensor in parameters:
                    writer.add(tensor)
                written = writer.finish()
            os.fsync(file)
            self._partial(version).rename(self._complete(version))
            _flush(self._directory.path)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            free = shutil.disk_usage(self._shared).free
            raise OSError(errno.ENOSPC, _no_room(self._shared, parameters.bytes, free)) from error
        finally:
            del self._writers[version]
            os.close(file)
            self._partial(version).unlink(missing_ok=True)
        self._versions.add(version)
        return written

    def keep_only(self, version: int) -> None:
        for other in self._versions - {version}:
            self.discard(other)

    def discard(self, version: int) -> None:
        if version in self._writers:
            os.close(self._writers.pop(version)[1])
        self._partial(version).unlink(missing_ok=True)
        self._complete(version).unlink(missing_ok=True)
        self._versions.discard(version)

    def close(self) -> None:
        for _, file in self._writers.values():
            os.close(file)
        self._writers.clear()
        self._versions.clear()
        self._directory.remove()

    def _partial(self, version: int) -> Path:
        return self._directory.path / f".v{version}.partial"

    def _complete(self, version: int) -> Path:
        return self._directory.path / f"v{version}.safetensors"


def _no_room(directory: Path, needed: int, free: int) -> str:
    return (
        f"sync.directory {directory} has no room for weights: {needed / 2**20:,.0f} MB are needed, "
        f"{free / 2**20:,.0f} MB are free. Two versions lie there while replicas change from one to the next"
    )


def _flush(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
