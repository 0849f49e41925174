"""What runs in a reward worker: user code in one process, and a supervisor of it in another.

User code may start processes of its own, and these may outlive it. The supervisor adopts all of them (Linux's
"child subreaper") and kills them when the driver closes its connection, when the worker dies, or when the driver does.
"""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from learner.environments.rewards.base import Failure, Reading, RewardItem, UnusableAnswerError
from learner.environments.rewards.descriptions import described, printable
from learner.environments.rewards.number import NoNumberError, as_reward
from learner.run.errors import InputError

RewardFunction = Callable[[RewardItem], Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A reward function, and what it reads."""

    function: RewardFunction
    reading: Reading


Load = Callable[[], Loaded]

KILL_SECONDS = 5.0
TRACEBACK_CHARACTERS = 4000
TAIL_BYTES = 2000
"""How much of the last output the message of a worker's death holds."""
LAST_OUTPUT_SECONDS = 0.2
LOGGED_BYTES = 32_000
"""How much of its output a worker sends to the log. Fits into the connection, so that sending it never waits."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call or of loading: a value, or a failure's one line and an error's traceback."""

    value: float = 0.0
    failure: Failure | None = None
    message: str = ""
    traceback: str = ""
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Some of what user code wrote to standard output and error."""

    text: str


@dataclass(frozen=True, slots=True)
class Death:
    """How the worker ended, and what it wrote last."""

    reason: str
    output: str


def supervise(work: Connection, control: Connection, load: Load) -> None:
    """Fork the worker, which answers at `work`, and stay until it or the driver is gone. Sends a `Death` at the end."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    os.setsid()
    _set(_PR_SET_CHILD_SUBREAPER, 1)
    output, their_output = os.pipe()
    worker = os.fork()
    if worker == 0:
        control.close()
        os.close(output)
        _run_worker(work, their_output, load)
    work.close()
    os.close(their_output)
    try:
        death = _watch(worker, control, output)
    finally:
        _kill_all(worker)
    if death is not None:
        with contextlib.suppress(OSError):
            control.send(death)


def _watch(worker: int, control: Connection, output: int) -> Death | None:
    """Pass output on until the worker is dead; None if the driver does not want it any more."""
    ended, their_ended = os.pipe()
    reasons: list[str] = []
    threading.Thread(target=_reap, args=(worker, reasons, their_ended), daemon=True).start()
    watched: list[Any] = [control, ended, output]
    tail, logged = b"", 0
    end: float | None = None
    while True:
        # What a dead worker wrote last is still read, but a process that it left behind may write for ever.
        end = end or (time.monotonic() + LAST_OUTPUT_SECONDS if reasons else None)
        ready = wait(watched)
        if control in ready:
            return None
        if output in ready and (end is None or time.monotonic() < end):
            written = os.read(output, 65536)
            tail = (tail + written)[-TAIL_BYTES:]
            if not written:
                watched.remove(output)
            elif logged < LOGGED_BYTES:
                _log(control, written[: LOGGED_BYTES - logged])
                logged += len(written)
                if logged >= LOGGED_BYTES:
                    _log(control, b"(what this worker writes from here on is dropped)")
        elif ended in ready:
            return Death(reasons[0], tail.decode(errors="replace"))


def _log(control: Connection, written: bytes) -> None:
    with contextlib.suppress(OSError):
        control.send(Output(written.decode(errors="replace")))


def _reap(worker: int, reasons: list[str], ended: int) -> None:
    """Collect every process that ends, adopted ones too; of the worker, note how."""
    while True:
        try:
            process, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        if process == worker:
            code = os.waitstatus_to_exitcode(status)
            reasons.append(_signal_name(-code) if code < 0 else f"exit status {code}")
            os.write(ended, b"x")


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        # Real-time signals have no names.
        return f"signal {number}"


def _set(option: int, value: int) -> None:
    """Linux's `prctl`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl fails")


def _kill_all(worker: int) -> None:
    """Kill the worker and every process that it or its children started, also those in sessions of their own."""
    deadline = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    while time.monotonic() < deadline:
        living = [child for child in psutil.Process().children(recursive=True) if _lives(child)]
        if not living:
            return
        for child in living:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                child.kill()
        time.sleep(0.01)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _run_worker(work: Connection, output: int, load: Load) -> None:
    """The worker's process: load the function, then answer one item at a time. Does not return."""
    try:
        os.setsid()
        # Only if the supervisor itself is killed, by the kernel when memory is short for example.
        _set(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A terminal's Ctrl-C does not come here; the driver decides when workers end.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # multiprocessing forbids children to the processes that it starts as daemons.
        multiprocessing.current_process().daemon = False
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.enable()
        _answer(work, load)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _answer(work: Connection, load: Load) -> None:
    own = os.getpid()
    try:
        loaded = load()
    except InputError as error:
        work.send(Outcome(failure="error", message=printable(str(error))))
        return
    except BaseException as error:
        work.send(Outcome(failure="error", message=described(error), traceback=_traceback()))
        return
    work.send(Outcome(reading=loaded.reading))
    while True:
        try:
            item = work.recv()
        except EOFError:
            return
        outcome = call(loaded.function, item)
        if os.getpid() != own:
            # User code forked, and its child came back from the function too: only the parent answers.
            os._exit(0)
        work.send(outcome)


def call(function: RewardFunction, item: RewardItem) -> Outcome:
    """What a reward function makes of an item, whatever it raises or returns."""
    try:
        return Outcome(value=as_reward(function(item)))
    except UnusableAnswerError as error:
        return Outcome(failure="unusable_answer", message=printable(str(error)))
    except NoNumberError as error:
        return Outcome(failure="error", message=str(error))
    except BaseException as error:
        return Outcome(failure="error", message=described(error), traceback=_traceback())


def _traceback() -> str:
    try:
        text = printable(traceback.format_exc())
    except BaseException as error:
        return f"(the traceback can't be shown: {type(error).__name__})"
    half = TRACEBACK_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n...\n{text[-half:]}"
