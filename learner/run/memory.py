"""Peak memory of the driver and everything it started: Ray's processes too, but not those of a cluster elsewhere."""

import contextlib
import threading
from pathlib import Path

import psutil

SAMPLE_SECONDS = 5.0
JOIN_SECONDS = 10.0
_GIB = 1024**3


class PeakMemory:
    """A context manager that samples the process tree every few seconds in a thread of its own, and at its end.

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

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            self.peak_bytes = max(self.peak_bytes, tree_bytes())
            stopping = self._stop.wait(self._interval)
        self.peak_bytes = max(self.peak_bytes, tree_bytes())


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
