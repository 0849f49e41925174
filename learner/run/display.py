"""What a run shows on the terminal: one live display, or a line a step where the output is no terminal."""

import time
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from common import metrics as names

REFRESHES_PER_SECOND = 4
PLAIN_WIDTH = 120


class Display:
    """Shows phases, steps and messages; `console` prints above the live part."""

    def __init__(self, terminal: TextIO) -> None:
        self.console = Console(file=terminal, width=None if terminal.isatty() else PLAIN_WIDTH)
        self._is_live = self.console.is_terminal
        self._seconds: deque[float] = deque(maxlen=10)
        self._figures = Text()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("starting", total=None, count="")
        self._live = Live(
            Stack(self._progress, self._figures),
            console=self.console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._started = time.monotonic()
        self._phase = ""

    def start(self) -> None:
        """Begin to draw, on a terminal."""
        if self._is_live:
            self._live.start()

    def stop(self) -> None:
        """Take the live part off the terminal. May be called twice."""
        if self._is_live:
            self._live.stop()

    def phase(self, text: str, completed: int = 0, total: int | None = None) -> None:
        """What is being done, with a bar if it is known how much there is to do."""
        if self._is_live:
            count = "" if total is None else f"{completed}/{total}"
            self._progress.update(self._task, description=text, completed=completed, count=count)
            # `update` takes None for "as before", but a phase of unknown length must not keep the last one's.
            self._progress.tasks[0].total = total
        elif text != self._phase:
            self.message(text)
        self._phase = text

    def step(self, metrics: Mapping[str, Any], steps: int) -> None:
        """A finished training step's figures."""
        step = int(metrics[names.STEP])
        self._seconds.append(float(metrics[names.STEP_SECONDS]))
        figures = self._describe(metrics, (steps - step) * fmean(self._seconds))
        if self._is_live:
            self._figures.plain = figures
        else:
            self.message(f"step {step}/{steps}  {figures}")

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._is_live:
            self.console.print(text, highlight=False, markup=False)
        else:
            seconds = time.monotonic() - self._started
            self.console.print(f"{seconds:7.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def show(self, *renderables: RenderableType) -> None:
        """Print tables below everything else."""
        self.stop()
        for renderable in renderables:
            self.console.print(renderable)

    @staticmethod
    def _describe(metrics: Mapping[str, Any], seconds_left: float) -> str:
        minutes, seconds = divmod(round(seconds_left), 60)
        return "  ".join(
            (
                f"reward {metrics[names.REWARD_MEAN]:.3f}",
                f"plain success {metrics[names.PLAIN_SUCCESS_RATE]:.3f}",
                f"erase rate {metrics[names.ERASE_RATE]:.3f}",
                f"weights v{metrics[names.POLICY_VERSION]}",
                f"{metrics[names.TOKENS_PER_SECOND] or 0.0:,.0f} tokens/s",
                f"step {metrics[names.STEP_SECONDS]:.1f} s",
                f"sync {metrics[names.SYNC_SECONDS]:.2f} s",
                f"{minutes}:{seconds:02d} left",
            )
        )
