"""What can stop a run, and the exit status that each of them has."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space, over quota, over the process's file size limit: to a run they are all "the disk is full"."""

OWN_PACKAGES = ("common", "learner", "rollout_server")


class InputError(Exception):
    """Something the user gave can't be used: a file, a model, a reward function, a run's name. Exit status 2."""


class PartError(Exception):
    """A part of a running run failed. The message names the part; `__cause__` has the details. Exit status 1."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(f"{part}: {message}")
        self.part = part
        self._arguments: tuple[object, ...] = (part, message)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes.
        return type(self), self._arguments


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM). Exit status 130."""


@contextmanager
def part(name: str, step: int | None = None) -> Iterator[None]:
    """Give any failure inside the name of the part that it happened in."""
    try:
        yield
    except (PartError, InputError, Interrupted):
        raise
    except Exception as error:
        place = "" if step is None else f"step {step}: "
        raise PartError(name, place + summary(error)) from error


def summary(error: BaseException) -> str:
    """One line for people. The project's own errors speak for themselves; of others the innermost cause says most.

    A `RayTaskError` carries the actor's whole traceback in its text, for example; its cause says what went wrong.
    """
    innermost = error
    while not _is_ours(innermost) and innermost.__cause__ is not None:
        innermost = innermost.__cause__
    text = str(innermost).strip()
    if _is_ours(innermost) or (isinstance(innermost, TimeoutError) and text):
        return text
    first_line = text.splitlines()[0] if text else ""
    return f"{type(innermost).__name__}: {first_line}".removesuffix(": ")


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in OWN_PACKAGES


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, and why, in words that tell the user what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(path, error.strerror or str(error)) from error
        raise PartError("run directory", f"cannot write {path}: {error.strerror or error}") from error


class DiskFullError(PartError):
    """The run directory's disk is full; everything written before is still there."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            "run directory",
            f"the disk is full: cannot write {path} ({reason}). Everything written before is kept: free some "
            "space, then continue with --resume",
        )
        self._arguments = (path, reason)
