"""Trajectory files, written by a process of its own: neither the driver's time nor its memory goes into them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.packed import Group, TokenArrays
from learner.run.trajectory_files import write_trajectories

WRITE_SECONDS = 600.0
RETRIES = 2
"""How often a step is written again whose process died. A file is there whole or not at all."""


class WriterActor:
    """The process. It fetches the arrays from wherever the responses were generated."""

    def write(self, path: Path, step: int, groups: Sequence[Group]) -> None:
        write_trajectories(path, step, groups, _fetch)


class TrajectoryWriter:
    """Starts the process when there is something to write. Ray must be connected."""

    def __init__(self) -> None:
        self._actor: Any = None

    def write(self, path: Path, step: int, groups: Sequence[Group]) -> None:
        """Write a step's responses, and wait until they are written.

        Raises DiskFullError or PartError if they can't be, and TimeoutError if it takes too long.
        """
        if self._actor is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": RETRIES, "scheduling_strategy": here}
            self._actor = ray.remote(WriterActor).options(**options).remote()
        try:
            ray.get(self._actor.write.remote(path.resolve(), step, list(groups)), timeout=WRITE_SECONDS)
        except GetTimeoutError:
            raise TimeoutError(f"{path} was not written within {WRITE_SECONDS:g} s") from None
        except RayTaskError as error:
            raise error.cause from error

    def close(self) -> None:
        """Stop the process."""
        if self._actor is not None:
            actor, self._actor = self._actor, None
            # The end of the cluster takes the process with it, too.
            with suppress(RayError):
                ray.kill(actor, no_restart=True)


def _fetch(references: list[Any]) -> list[TokenArrays]:
    found: list[TokenArrays] = ray.get(references, timeout=WRITE_SECONDS)
    return found
