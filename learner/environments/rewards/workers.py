"""The driver's side of reward workers: a pool of processes, each of which can be killed with all that it started.

A Python thread can't be stopped, and `math-verify`'s own time limit is an alarm signal that works in a main thread
only and not against a hang in C code. So every call runs in a process that is killed when its time is up. Pools of
libraries kill the worker alone, and its children live on; see `worker_process` for how they do not here.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import queue
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from learner.environments.rewards.base import RewardItem
from learner.environments.rewards.descriptions import described
from learner.environments.rewards.worker_process import Death, Load, Outcome, Output, supervise

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
TRANSFER_SECONDS = 30.0
"""For the bytes of one item or outcome: only a worker that was stopped by a signal does not take them at once."""

_CLOSED = Outcome(failure="error", message="the rewards are being closed")


class Worker:
    """One worker process and its supervisor. Started when it is needed, and again after it was killed or died.

    `closing`: readable once the pool is being closed, which ends every wait.
    """

    def __init__(self, load: Load, start_seconds: float, closing: Connection) -> None:
        self._load = load
        self._start_seconds = start_seconds
        self._closing = closing
        self._process: multiprocessing.process.BaseProcess | None = None
        self._work: Connection | None = None
        self._control: Connection | None = None

    def start(self) -> Outcome:
        """Start the processes and wait until the function is loaded."""
        # Spawned, not forked: the driver has threads of Ray, which a forked child would inherit half-way.
        context = multiprocessing.get_context("spawn")
        self._work, their_work = context.Pipe()
        self._control, their_control = context.Pipe()
        _limit_waits(self._work)
        _limit_waits(self._control)
        self._process = context.Process(target=supervise, args=(their_work, their_control, self._load), daemon=True)
        self._process.start()
        their_work.close()
        their_control.close()
        outcome = self._receive(self._start_seconds)
        if outcome.failure == "timeout":
            message = f"did not load within {self._start_seconds:g} s (reward.start_seconds)"
            outcome = Outcome(failure="error", message=message)
        if outcome.failure is not None:
            self.stop()
        return outcome

    def call(self, item: RewardItem, timeout_seconds: float) -> Outcome:
        """The item's reward, or a time-out, after which the process is killed."""
        for _ in range(2):
            if self._work is None:
                started = self.start()
                if started.failure is not None:
                    return started
            try:
                if self._is_alive() and self._work is not None:
                    self._work.send(item)
                    return self._receive(timeout_seconds)
            except (BrokenPipeError, ConnectionResetError):
                pass
            except OSError as error:
                return self._died(f"it does not take its next call: {error.strerror or error}")
            except Exception as error:
                # The whole message is made before any of it is sent: the worker is as it was.
                message = f"its row can't be sent to another process: {described(error)}"
                return Outcome(failure="error", message=message)
            # Killed from outside while it had nothing to do: no fault of this item.
            log.warning("a reward worker died while it had nothing to do, and is started again")
            self.stop()
        return Outcome(failure="error", message="reward workers die while they have nothing to do")

    def stop(self) -> None:
        """Kill the worker and all that it started, if there is one."""
        for connection in (self._control, self._work):
            if connection is not None:
                connection.close()
        process = self._process
        self._process = self._work = self._control = None
        if process is None:
            return
        process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
            process.join(STOP_SECONDS)
        process.close()

    def _receive(self, timeout_seconds: float) -> Outcome:
        """What the worker answers. Without an answer it is killed."""
        assert self._work is not None
        assert self._control is not None
        end = time.monotonic() + timeout_seconds
        while (left := end - time.monotonic()) > 0.0:
            ready = wait([self._work, self._control, self._closing], left)
            if self._closing in ready:
                self.stop()
                return _CLOSED
            message = _message(self._work) if self._work in ready else None
            if isinstance(message, Outcome):
                return message
            if self._work in ready:
                return self._died("its connection is closed")
            if self._control in ready:
                message = _message(self._control)
                if not isinstance(message, Output):
                    return self._died("its supervisor is gone", message)
                _show(message)
        self.stop()
        return Outcome(failure="timeout")

    def _is_alive(self) -> bool:
        """Whether the idle worker is there, as far as it is known; shows what it wrote since."""
        if self._process is None or self._control is None or not self._process.is_alive():
            return False
        try:
            while self._control.poll():
                message = _message(self._control)
                if not isinstance(message, Output):
                    return False
                _show(message)
        except OSError:
            return False
        return True

    def _died(self, what_is_seen: str, message: Any = None) -> Outcome:
        """The error of a worker that died, which its supervisor explains."""
        assert self._control is not None
        end = time.monotonic() + STOP_SECONDS
        while not isinstance(message, Death) and (left := end - time.monotonic()) > 0.0:
            if not wait([self._control], left):
                break
            message = _message(self._control)
            if message is None:
                break
        self.stop()
        if not isinstance(message, Death):
            return Outcome(failure="error", message=f"the worker process died ({what_is_seen})")
        output = f"its last output:\n{message.output}" if message.output.strip() else ""
        return Outcome(failure="error", message=f"the worker process died ({message.reason})", traceback=output)


class WorkerPool:
    """Some workers that score items side by side."""

    def __init__(self, load: Load, workers: int, start_seconds: float) -> None:
        closing, self._close_it = multiprocessing.Pipe(duplex=False)
        self._closing = closing
        self._workers = [Worker(load, start_seconds, closing) for _ in range(workers)]
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._closed = False

    async def start(self) -> Outcome:
        """Start one worker: enough to learn whether the function loads. The others start when they are needed."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._workers[0].start)

    async def call(self, item: RewardItem, timeout_seconds: float) -> Outcome:
        """The outcome of one item. The time limit begins when a worker takes it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, item, timeout_seconds)

    async def close(self) -> None:
        """Kill all workers; calls that still wait end with an error."""
        if self._closed:
            return
        self._closed = True
        # Makes `closing` readable, and so wakes every thread that waits for its worker.
        self._close_it.close()
        await asyncio.get_running_loop().run_in_executor(None, self._stop_all)

    def _stop_all(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        with ThreadPoolExecutor(len(self._workers)) as threads:
            list(threads.map(Worker.stop, self._workers))
        self._closing.close()

    def _call(self, item: RewardItem, timeout_seconds: float) -> Outcome:
        if self._closed:
            return _CLOSED
        # There are as many threads as workers, so one is free.
        worker = self._free.get_nowait()
        try:
            return worker.call(item, timeout_seconds)
        finally:
            self._free.put(worker)


def _message(connection: Connection) -> Any:
    """The next message; None if there is none, or it is broken, because the other side is gone."""
    try:
        return connection.recv()
    except Exception:
        return None


def _show(output: Output) -> None:
    log.info("a reward worker wrote:\n%s", output.text.rstrip())


def _limit_waits(connection: Connection) -> None:
    """Let no send and no receive of this side wait for ever: both raise OSError when the time is over."""
    seconds = struct.pack("@ll", math.ceil(TRANSFER_SECONDS), 0)
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
