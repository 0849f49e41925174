"""How many CPU cores this process may use, and how many threads an engine on them gets."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may use: not more than its affinity or its control group's quota allows."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def threads_per_engine(engines: int) -> int:
    """Threads for each of several engines on this machine, together not more than there are cores.

    OpenMP's threads wait for each other in a loop: where there are more of them than cores, the one that is waited for
    does not run, and a step takes many times as long.
    """
    return max(1, available_cores() // engines)


def chosen_threads() -> int | None:
    """What `OMP_NUM_THREADS` says; null if it is not set, or where Ray sets it by itself: to 1 in its jobs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return int(given) if given.isdecimal() and int(given) and not is_job else None


def _quota() -> float | None:
    """Cores that the control group may use in a period, with those above it; null without a limit."""
    quotas = []
    for line in _lines(MEMBERSHIP):
        _, _, path = line.rpartition(":")
        is_v2 = line.startswith("0::")
        if not is_v2 and "cpu" not in line.split(":")[1].split(","):
            continue
        root = CGROUPS if is_v2 else CGROUPS / "cpu"
        group = root / path.lstrip("/")
        while True:
            quota = _quota_v2(group) if is_v2 else _quota_v1(group)
            if quota is not None:
                quotas.append(quota)
            if group == root or root not in group.parents:
                break
            group = group.parent
    return min(quotas, default=None)


def _quota_v2(group: Path) -> float | None:
    fields = " ".join(_lines(group / "cpu.max")).split()
    return int(fields[0]) / int(fields[1]) if len(fields) == 2 and fields[0] != "max" else None


def _quota_v1(group: Path) -> float | None:
    quota, period = _lines(group / "cpu.cfs_quota_us"), _lines(group / "cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _lines(path: Path) -> list[str]:
    """A file's lines; none if there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
