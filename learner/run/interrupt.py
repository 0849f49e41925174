"""Ctrl-C and SIGTERM: the first asks for a clean end with a checkpoint, the second ends at once."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from learner.run.errors import Interrupted

Result = TypeVar("Result")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_STATUS = 130


class StopRequest:
    """Whether the user wants the run to end. A context manager, to be entered in the running event loop."""

    def __init__(self, on_first: Callable[[], None], before_exit: Callable[[], None]) -> None:
        self._event = asyncio.Event()
        self._on_first = on_first
        self._before_exit = before_exit

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def unless_stopped(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`; if a stop is asked for first, `work` is cancelled and Interrupted raised."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted
            return task.result()
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _receive(self) -> None:
        if self._event.is_set():
            self._before_exit()
            # Not sys.exit: other threads and actors must not be able to hold up the second Ctrl-C.
            os._exit(EXIT_STATUS)
        self._event.set()
        self._on_first()
