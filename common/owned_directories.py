"""Temporary directories that are known to have an owner, and the removal of those whose owner is gone.

An owner holds a lock (`flock`) on its directory for as long as it lives, however it ends. A lock belongs to the file
itself, so it tells the same in every container that shares the directory, whatever process ids mean there. Names can't
be guessed, and nobody but their user can enter the directories.
"""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class OwnedDirectory:
    """A new directory that this process owns until `remove`."""

    def __init__(self, prefix: str, parent: Path) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            try:
                self._lock = os.open(self.path, _OPEN)
            except FileNotFoundError:
                continue
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if _is_open_at(self._lock, self.path):
                return
            # Who looked for leftovers found it before it was locked.
            os.close(self._lock)

    def create(self, name: str) -> int:
        """A new file in it, open for reading and writing, that only this user may read."""
        return os.open(self.path / name, (_NEW & ~os.O_WRONLY) | os.O_RDWR, 0o600)

    def remove(self) -> None:
        """Delete it with what it holds, and own it no more; may be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_leftovers(prefix: str, parents: Iterable[Path], untouched_seconds: float = 0.0) -> list[Path]:
    """Delete directories of this user that begin with `prefix` and that nobody owns; what was deleted.

    `untouched_seconds`: leave those in which a file was made or removed since.
    """
    removed = []
    for parent in set(parents):
        for path in sorted(parent.glob(f"{prefix}*")) if parent.is_dir() else ():
            try:
                if _remove_unowned(path, untouched_seconds):
                    removed.append(path)
            except OSError as error:
                log.warning("a directory that nobody needs stays: %s", error)
    return removed


def _remove_unowned(path: Path, untouched_seconds: float) -> bool:
    try:
        lock = os.open(path, _OPEN)
    except OSError:
        # No directory, a link, another user's, or gone meanwhile: none of ours to judge.
        return False
    try:
        state = os.fstat(lock)
        if state.st_uid != os.geteuid() or time.time() - state.st_mtime < untouched_seconds:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _is_open_at(lock, path):
            return False
        shutil.rmtree(path)
        return True
    finally:
        os.close(lock)


def _is_open_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
