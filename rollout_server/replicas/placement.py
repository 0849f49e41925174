"""Where replicas run in a Ray cluster: a bundle of resources for each, reserved before the first one starts."""

import asyncio
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.run import EngineConfig


class NoRoomForReplicas(Exception):
    """The cluster lacks what the replicas need; the message has the arithmetic."""


class Placement:
    """One placement group of a bundle a replica. Bundles stay when a replica dies, so that it can come back."""

    def __init__(self, engine: EngineConfig) -> None:
        self._engine = engine
        self._group: PlacementGroup | None = None
        self._reserving = asyncio.Lock()

    @property
    def on_gpu(self) -> bool:
        return bool(ray.cluster_resources().get("GPU"))

    @property
    def bundle(self) -> dict[str, float]:
        """What a replica takes: its GPUs where there are any, else a CPU."""
        return {"GPU": float(self._engine.tensor_parallel_size)} if self.on_gpu else {"CPU": 1.0}

    async def options(self, replica: int) -> dict[str, Any]:
        """Options for the actor of a replica. Reserves all bundles at the first call.

        Raises:
            NoRoomForReplicas: there will never be room, or there is none within `start_seconds`.
        """
        async with self._reserving:
            if self._group is None:
                self._group = await self._reserved()
        bundle = self.bundle
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=replica)
        return {
            "num_cpus": bundle.get("CPU", 0.0),
            "num_gpus": bundle.get("GPU", 0.0),
            "scheduling_strategy": strategy,
        }

    async def _reserved(self) -> PlacementGroup:
        bundle, count = self.bundle, self._engine.replicas
        self._check(bundle, count)
        group: PlacementGroup = placement_group([bundle] * count, strategy="PACK")
        seconds = self._engine.start_seconds
        if await asyncio.to_thread(group.wait, seconds):
            return group
        remove_placement_group(group)
        free = ray.available_resources()
        raise NoRoomForReplicas(f"{_needed(bundle, count, free)} free, within {seconds:g} s")

    def _check(self, bundle: dict[str, float], count: int) -> None:
        there = ray.cluster_resources()
        if any(amount * count > there.get(name, 0.0) for name, amount in bundle.items()):
            raise NoRoomForReplicas(f"{_needed(bundle, count, there)} in the cluster")

    def release(self) -> None:
        """Give the bundles back."""
        if self._group is not None:
            group, self._group = self._group, None
            remove_placement_group(group)


def _needed(bundle: dict[str, float], count: int, there: dict[str, float]) -> str:
    """The arithmetic, for all resources."""
    return "; ".join(
        f"rollout.engine.replicas ({count}) need {amount * count:g} {name} ({count} x {amount:g}), "
        f"and there are {there.get(name, 0.0):g}"
        for name, amount in bundle.items()
    )
