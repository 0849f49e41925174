"""`make chaos`: one run under many faults, with the checks of what it leaves.

python -m tests.chaos.run --faults 50 --seed 1 --minutes 40
"""

import argparse
import collections
import logging
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.checks import Leftovers, check_ledger, check_metrics, check_staleness
from tests.chaos.faults import KINDS, Scene
from tests.chaos.nodes import local_cluster
from tests.chaos.training import Training

log = logging.getLogger("e3rl.chaos")
DISK_BYTES = 256 * 2**20
STARTS_IN = 240.0


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A file system of its own on `place`, in memory; None where this user may not mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "e3rl-chaos", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        log.warning("the kind 'disk full' is left out: %s", mounted.stderr.strip())
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def run(place: Path, kinds: list[str], seed: int, seconds: float, patience: float, max_staleness: int = 1) -> None:
    """One fault after the other in the order of `kinds`, each at a random moment of the steps after the last."""
    leftovers = Leftovers()
    draw = random.Random(seed)
    began = time.monotonic()
    with small_disk(place / "disk") as disk, local_cluster(place, nodes=2) as cluster:
        variables = cluster.variables | {"RAY_ADDRESS": cluster.address}
        training = Training(place, disk or place / "disk", variables, patience, max_staleness=max_staleness, ranks=2)
        scene = Scene(cluster, training, disk, draw)
        training.start()
        training.await_steps(1)
        log.info("%6.1f s  the run has begun", time.monotonic() - began)
        counts: collections.Counter[str] = collections.Counter()
        for number, kind in enumerate(kinds, start=1):
            if kind == "disk full" and disk is None:
                continue
            if time.monotonic() - began > seconds:
                raise AssertionError(f"only {number - 1} of {len(kinds)} faults within {seconds:g} s")
            time.sleep(draw.uniform(0.0, 3.0))
            hit = KINDS[kind](scene)
            at = time.monotonic()
            training.await_steps(2)
            counts[kind] += 1
            recovered = time.monotonic() - at
            log.info("%6.1f s  %s: %s; two steps later after %.1f s", at - began, kind, hit, recovered)
        training.finish(2)
        turns = check_ledger(training.directory)
        check_staleness(training.directory, max_staleness)
        check_metrics(training.directory)
        log.info(
            "%6.1f s  %d faults (%s), %d starts of the driver, %d steps: each of %d prompts was trained once",
            time.monotonic() - began, counts.total(), ", ".join(f"{n} {kind}" for kind, n in counts.items()),
            training.starts, training.steps, turns,
        )  # fmt: skip
    leftovers.check(str(place), str(cluster.temporary))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=50, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides kinds, victims and moments (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=40.0, help="longest duration (default %(default)s)")
    parser.add_argument("--patience", type=float, default=STARTS_IN, help="seconds to recover in (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS))
    parser.add_argument("--keep", action="store_true", help="leave the run's directory")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    draw = random.Random(arguments.seed)
    # Each kind at least once where there are enough faults.
    kinds = [arguments.kinds[n % len(arguments.kinds)] for n in range(arguments.faults)]
    draw.shuffle(kinds)
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        run(place, kinds, arguments.seed, 60.0 * arguments.minutes, arguments.patience)
    except AssertionError as error:
        print(f"failed: {error}", file=sys.stderr)
        print(f"the run's files are in {place}", file=sys.stderr)
        return 1
    if not arguments.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
