"""Peak memory of the driver and everything it started, Ray's processes included."""

import contextlib
import threading
from pathlib import Path

import psutil

SAMPLE_SECONDS = 5.0
_GIB = 1024**3


class PeakMemory:
    """Samples the process tree every few seconds in a thread of its own.

    A page that several processes share counts once (proportional set size); where the kernel does not say, the
    resident size is taken, which counts it several times. A peak shorter than the interval may be missed.
    """

    def __init__(self, interval_seconds: float = SAMPLE_SECONDS) -> None:
        self.peak_bytes = 0
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / _GIB

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end."""
        self._stop.set()
        self._thread.join(self._interval)

    def _run(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_bytes())
            if self._stop.wait(self._interval):
                return


def tree_bytes() -> int:
    """Memory of this process and all its descendants, in bytes."""
    driver = psutil.Process()
    total = 0
    for process in [driver, *driver.children(recursive=True)]:
        # A process may end between being listed and being read.
        with contextlib.suppress(psutil.Error, OSError):
            total += _process_bytes(process)
    return total


def _process_bytes(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    resident: int = process.memory_info().rss
    return resident
