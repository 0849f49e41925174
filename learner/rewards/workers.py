"""Worker processes for reward functions, each of which can be killed.

A Python thread can't be stopped, and `math-verify`'s own time limit is an alarm signal that works in a main thread
only and not against a hang in C code. So every call runs in a process that is killed when its time is up.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from learner.rewards.base import RewardItem, UnusableAnswerError

log = logging.getLogger(__name__)

RewardFunction = Callable[[RewardItem], Any]
START_SECONDS = 120.0
STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker answered: a value, or an error's one line and its traceback, or neither when time was up.

    `warning`: why the value is 0, if it is not the response's fault.
    """

    value: Any = None
    warning: str = ""
    error: str | None = None
    traceback: str = ""
    timed_out: bool = False


def _serve(connection: Connection, load: Callable[[], RewardFunction]) -> None:
    """A worker's main function: load the reward function, then answer one item at a time."""
    # Ctrl-C goes to the whole process group; the driver decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function = load()
    except BaseException as error:
        connection.send(Outcome(error=str(error)))
        return
    connection.send(Outcome())
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, item))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: RewardFunction, item: RewardItem) -> Outcome:
    try:
        value = function(item)
    except UnusableAnswerError as error:
        return Outcome(value=0.0, warning=str(error))
    except Exception as error:
        return Outcome(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
    try:
        number = float(value)
    except (TypeError, ValueError):
        return Outcome(error=f"returned {value!r:.80} ({type(value).__name__}), which is not a number")
    if not math.isfinite(number):
        return Outcome(error=f"returned {number}, which is not a finite number")
    return Outcome(value=number)


class Worker:
    """One process and its pipe. Started again after it was killed or died."""

    def __init__(self, load: Callable[[], RewardFunction]) -> None:
        self._load = load
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def start(self) -> Outcome:
        """Start the process and wait until its function is loaded."""
        # Spawned, not forked: the driver has threads of Ray, which a forked child would inherit half-way.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._load), daemon=True)
        self._process.start()
        theirs.close()
        outcome = self._receive(START_SECONDS)
        if outcome.timed_out:
            return Outcome(error=f"did not load within {START_SECONDS:g} s")
        return outcome

    def call(self, item: RewardItem, timeout_seconds: float) -> Outcome:
        """The item's reward, or a time-out, after which the process is killed."""
        if self._process is not None and not self._process.is_alive():
            # Killed from outside while it had nothing to do: no fault of this item.
            log.warning("a reward worker died (exit status %s) and is started again", self._process.exitcode)
            self.stop()
        if self._connection is None:
            started = self.start()
            if started.error is not None:
                return started
        return self._receive(timeout_seconds, item)

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join(STOP_SECONDS)
        self._connection = self._process = None

    def _receive(self, timeout_seconds: float, item: RewardItem | None = None) -> Outcome:
        """What the process answers, to `item` if there is one. Without an answer the process is killed."""
        assert self._connection is not None
        try:
            if item is not None:
                self._connection.send(item)
            if self._connection.poll(timeout_seconds):
                outcome: Outcome = self._connection.recv()
                return outcome
        except (EOFError, ConnectionError):
            code = self._process.exitcode if self._process else None
            self.stop()
            return Outcome(error=f"the worker process died (exit status {code})")
        self.stop()
        return Outcome(timed_out=True)


class WorkerPool:
    """Some workers that score items side by side."""

    def __init__(self, load: Callable[[], RewardFunction], workers: int) -> None:
        self._workers = [Worker(load) for _ in range(workers)]
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")

    async def start(self) -> Outcome:
        """Start one worker: enough to learn whether the function loads. The others start when they are needed."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._workers[0].start)

    async def call(self, items: Sequence[RewardItem], timeout_seconds: float) -> list[Outcome]:
        """One outcome for each item, in order."""
        loop = asyncio.get_running_loop()
        calls = [loop.run_in_executor(self._threads, self._call, item, timeout_seconds) for item in items]
        return list(await asyncio.gather(*calls))

    def close(self) -> None:
        """Kill all workers; calls that still wait end with an error."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def _call(self, item: RewardItem, timeout_seconds: float) -> Outcome:
        worker = self._free.get()
        try:
            return worker.call(item, timeout_seconds)
        finally:
            self._free.put(worker)
