"""Peak memory: what a run's processes took."""

import numpy as np

from learner.run.memory import PeakMemory


def test_a_peak_at_the_end_counts_however_long_the_interval():
    with PeakMemory(interval_seconds=600.0) as memory:
        pass
    before = memory.peak_bytes
    with PeakMemory(interval_seconds=600.0) as memory:
        held = np.ones(2**24)
    assert memory.peak_bytes > before + 0.9 * held.nbytes
    assert memory.peak_gib == memory.peak_bytes / 2**30
