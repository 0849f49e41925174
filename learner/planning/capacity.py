"""The whole plan: memory against devices, seconds of a step by phase, and what saturates first."""

from dataclasses import dataclass

from common.config.data import ChainReward
from learner.planning.assumptions import Assumptions
from learner.planning.generation import Generation, generation
from learner.planning.memory import (
    GIB,
    LearnerMemory,
    ReplicaMemory,
    engine_workspace,
    gib,
    learner_memory,
    longest_response,
    replica_memory,
)
from learner.planning.setup import Setup, check_setup, problems
from learner.planning.training import Training, training
from learner.planning.transfer import Checkpoint, Sync, checkpoint, sync
from learner.planning.work import Work, step_work

MOST_REWARD_WORKERS = 8
CHAIN_REWARD_SECONDS, REWARD_SECONDS = 0.0002, 0.02
"""Of one core, for a response: the demo's own task, and others (assumed)."""
KV_GAIN = 1.05
"""Generation counts as held up by KV memory if more of it would make it faster by so much."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs and how long a step takes. `problems`: why it could not run as it is."""

    setup: Setup
    assumptions: Assumptions
    work: Work
    learner: LearnerMemory
    replica: ReplicaMemory
    generation: Generation
    training: Training
    sync: Sync
    checkpoint: Checkpoint
    reward: float
    driver: float
    problems: list[str]

    @property
    def checkpoint_due(self) -> float:
        """Seconds of checkpoints in a step, the mean."""
        settings = self.setup.config.checkpoint
        if settings.latest:
            return self.checkpoint.seconds
        return self.checkpoint.seconds / settings.every_steps if settings.every_steps else 0.0

    @property
    def sides(self) -> dict[str, float]:
        """Seconds of what works at the same time in an asynchronous loop."""
        return {
            "rollout": max(self.generation.seconds + self._pause, self.reward),
            "learner": self.training.seconds + self.sync.seconds + self.checkpoint_due,
            "driver": self.driver,
        }

    @property
    def step_seconds(self) -> float:
        """Synchronous: one phase after the other, rewards and checkpoints beside generation. Else the longest side."""
        if not self.setup.is_synchronous:
            return max(self.sides.values())
        beside = max(self.generation.seconds, self.reward, self.checkpoint_due)
        return beside + self.training.seconds + self.sync.seconds + self.driver

    @property
    def busy(self) -> dict[str, float]:
        """Seconds of a step for which each resource is needed. What is needed for longest saturates first."""
        made, step, trained = self.generation, self.generation.engine_step, self.training
        share = made.decode / step.seconds
        reading = step.bandwidth >= step.operations
        return {
            "replicas: memory bandwidth": share * step.bandwidth if reading else 0.0,
            "replicas: operations": (0.0 if reading else share * step.operations) + made.prefill,
            "replicas: links": share * step.links,
            "replicas: engine steps": share * step.overhead,
            "replicas: the longest responses": made.tail,
            "replicas: responses under way at a sync": made.after_sync,
            "learner: operations": trained.operations,
            "learner: micro-batches": trained.overhead,
            "learner: links": trained.links,
            "learner: optimizer": trained.optimizer,
            "weight sync": self.sync.seconds,
            "checkpoint": self.checkpoint_due,
            "driver": self.driver,
            "rewards": self.reward,
        }

    @property
    def first(self) -> str:
        """What saturates first. KV memory does if it keeps generation, the longest part, from going faster."""
        made = self.generation
        candidates = self.busy
        if not self.setup.is_synchronous:
            longest = max(self.sides, key=lambda side: self.sides[side])
            candidates = {name: seconds for name, seconds in candidates.items() if _side(name) == longest}
            if longest == "rollout":
                candidates["weight sync"] = self._pause
        name = max(candidates, key=lambda name: candidates[name])
        gains = made.decode > KV_GAIN * made.with_more_memory
        return "replicas: KV memory" if name.startswith("replicas") and gains else name

    @property
    def _pause(self) -> float:
        """Seconds of a sync for which an asynchronous loop's replicas generate nothing."""
        return self.assumptions.sync_pause_share * self.sync.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, erased ones included, over the whole step."""
        return self.work.generated_tokens / self.step_seconds


def _side(resource: str) -> str:
    if resource in ("weight sync", "checkpoint") or resource.startswith("learner"):
        return "learner"
    return "driver" if resource == "driver" else "rollout"


def make_plan(setup: Setup, assumptions: Assumptions) -> Plan:
    """Raises InputError for what can't be; what does not fit is in the plan's `problems`."""
    check_setup(setup)
    config, shape, hardware = setup.config, setup.shape, setup.hardware
    memory = hardware.gpu_memory_gib * GIB if setup.on_gpu else None
    workspace = 0.0
    if setup.on_gpu:
        workspace = engine_workspace(
            config, shape, tensor_parallel=setup.tensor_parallel, base=assumptions.gpu_overhead_gib
        )
    work = step_work(config, assumptions)
    replica = replica_memory(config, shape, memory, tensor_parallel=setup.tensor_parallel, workspace=workspace)
    learner = learner_memory(config, shape, on_gpu=setup.on_gpu, offload=setup.offload)
    return Plan(
        setup=setup,
        assumptions=assumptions,
        work=work,
        learner=learner,
        replica=replica,
        generation=generation(setup, assumptions, work, replica),
        training=training(setup, assumptions, work),
        sync=sync(setup, assumptions),
        checkpoint=checkpoint(setup),
        reward=_reward(setup, assumptions, work),
        driver=work.generated_tokens / 1e6 * assumptions.driver_seconds_per_million_tokens,
        problems=[*problems(setup), *_too_small(setup, assumptions, learner, replica)],
    )


def _reward(setup: Setup, assumptions: Assumptions, work: Work) -> float:
    reward, each = setup.config.reward, assumptions.reward_seconds
    if isinstance(reward, ChainReward):
        # In the driver's own process.
        return work.responses * (CHAIN_REWARD_SECONDS if each is None else each)
    workers = reward.workers or min(setup.hardware.cores, MOST_REWARD_WORKERS)
    return work.responses * (REWARD_SECONDS if each is None else each) / workers


def _too_small(setup: Setup, assumptions: Assumptions, learner: LearnerMemory, replica: ReplicaMemory) -> list[str]:
    hardware, config = setup.hardware, setup.config
    found = []
    if replica.responses < 1:
        found.append(
            f"a replica holds not one response of full length: {longest_response(config):,} tokens, and its KV cache "
            f"of {gib(replica.cache)} holds {replica.tokens:,}"
        )
    if not setup.on_gpu:
        return found
    there = hardware.gpu_memory_gib * GIB
    usable = there * config.rollout.engine.gpu_memory_utilization
    if replica.weights + replica.workspace > usable:
        found.append(
            f"a replica's GPU is too small: {gib(replica.weights)} weights + {gib(replica.workspace)} workspace > "
            f"{gib(usable)} = gpu_memory_utilization {config.rollout.engine.gpu_memory_utilization} x {gib(there)}"
        )
    fits = there * assumptions.gpu_memory_share - assumptions.gpu_overhead_gib * GIB
    if learner.total > fits:
        parts = ", ".join(f"{gib(size)} {name}" for name, size in learner.parts().items())
        found.append(
            f"a learner's GPU is too small: {gib(learner.total)} needed ({parts}) > {gib(fits)} = "
            f"{assumptions.gpu_memory_share} x {gib(there)} - {gib(assumptions.gpu_overhead_gib * GIB)}"
        )
    hosted = learner.host * min(setup.ranks, hardware.gpus_per_node)
    if hosted > hardware.host_memory_gib * GIB:
        found.append(
            f"a learner's node is too small for what is offloaded: {gib(hosted)} > {hardware.host_memory_gib:,.0f} GiB"
        )
    return found
