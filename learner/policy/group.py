"""The learner as the driver sees it: one Ray actor per DeepSpeed rank, called together."""

import asyncio
import json
import math
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from common import metrics
from common.config.run import LearnerConfig, MaskOverlong, RunConfig
from common.manifest import write_manifest
from common.out_of_memory import learner_advice, ran_out_of_memory
from common.packed import Group
from common.weights.updates import HostUpdate, WeightUpdate
from common.weights.weight_file import WrittenWeights
from learner.environments.overlong import shaped_groups
from learner.objectives import GapHistogram, ObjectiveStatistics, WeightStatistics
from learner.policy.batching import RankBatch, rank_batches, split_minibatches, token_counts
from learner.policy.model import PolicyError
from learner.policy.rank import CHECKPOINT_DESCRIPTION, LearnerRank, MinibatchResult, NotFiniteError, Placement
from learner.run.errors import PartError
from learner.weights.host import remove_weight_leftovers

GRACE_SECONDS = 5.0
"""How long the other ranks have to answer after one has failed: a dead one shows up after its peers' errors."""


class LearnerError(RuntimeError):
    """The learner can't go on; the message says which rank failed at what, and why."""


class LearnerLost(LearnerError):
    """A rank died, or did not answer in time. `restart` makes new ranks, which know nothing yet."""


class LearnerGroup:
    """All ranks of the learner. After a LearnerError from a running group only `restart` and `close` are of use.

    Ray must be connected. Deadlines: `learner.step_seconds` for everything but publishing weights, which has
    `sync.deadline_seconds`.
    """

    rank_class: type[LearnerRank] = LearnerRank

    def __init__(self, config: RunConfig, log_directory: Path) -> None:
        self._config = config
        self._log_directory = log_directory.resolve()
        self._ranks: list[Any] = []
        self._failure: str | None = None
        self._path: Path | None = None

    async def start(self) -> None:
        """Start the ranks and load the model. Raises LearnerError with the reason if it can't be loaded."""
        self._log_directory.mkdir(parents=True, exist_ok=True)
        on_gpus = trains_on_gpus(self._config, int(ray.cluster_resources().get("GPU", 0.0)))
        options = self._actor_options(on_gpus)
        actor = ray.remote(self.rank_class)
        self._ranks = [
            actor.options(**options).remote(self._config, rank, str(self._log_directory))
            for rank in range(self._config.learner.ranks)
        ]
        seconds = self._config.learner.step_seconds
        placements: list[Placement] = await self._call("place", "starting", seconds)
        each = [(environment,) for environment in environments(placements, on_gpus)]
        await self._call("start", "loading the model", seconds, each=each)

    async def restart(self) -> None:
        """Stop the ranks, dead or alive, and start new ones. Raises as `start`."""
        await self.close()
        self._failure = None
        await self.start()

    async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Train on one rollout, `minibatches_per_step` optimizer steps; metrics by the names of `common.metrics`.

        Everything but the order of minibatches, which `seed` and `step` decide, is given by `groups`.
        """
        minibatches = await asyncio.to_thread(self._minibatches, groups, step)
        work = [([batches[rank] for batches in minibatches],) for rank in range(len(self._ranks))]
        results: list[list[MinibatchResult]] = await self._call(
            "train", f"training step {step}", self._config.learner.step_seconds, each=work
        )
        return _step_metrics(minibatches, results, self._config.learner)

    @asynccontextmanager
    async def publishing(self, version: int) -> AsyncIterator[WeightUpdate]:
        """Publish the current weights: replicas load what this yields within the block.

        A block that ends without an error says that every replica holds `version`, and that nobody needs an earlier
        one. Until then replicas may still load the version before, and after it this one, until the next block ends.

        Raises:
            PartError: of the learner, a parameter is not finite.
            LearnerError: the weights were not gathered or not sent.
        """
        what, seconds = f"publishing weights version {version}", self._config.sync.deadline_seconds
        each = [(version,)] * len(self._ranks)
        update = (await self._call("begin_publishing", what, seconds, each=each))[0]
        self._path = Path(update.path) if isinstance(update, HostUpdate) else None
        sending = asyncio.create_task(self._publish(update, what))
        try:
            if update.streams:
                yield update
                await sending
            else:
                yield await sending
        except BaseException:
            await self._give_up(sending, version)
            raise
        await self._call("keep_only", what, seconds, each=each)

    async def _publish(self, update: WeightUpdate, what: str) -> WeightUpdate:
        """The update with its checksum, once all of it was sent."""
        each = [(update.version,)] * len(self._ranks)
        # Its own deadline ends a sending first: a replica that is lost is no reason to lose the ranks.
        seconds = self._config.sync.deadline_seconds + GRACE_SECONDS
        results: list[WrittenWeights | None] = await self._call("publish", what, seconds, each=each)
        written = results[0]
        if written is None:
            raise LearnerError(f"{what}: rank 0 published nothing")
        if written.not_finite is not None:
            # As a failure of the learner, so that no checkpoint is made of these weights.
            raise PartError("learner", f"weights version {update.version}: {written.not_finite} holds NaN or infinity")
        return update.model_copy(update={"checksum": written.checksum})

    async def _give_up(self, sending: "asyncio.Task[WeightUpdate]", version: int) -> None:
        """After an error. What went wrong in the ranks goes before what replicas then saw of it."""
        await asyncio.gather(sending, return_exceptions=True)
        if self._failure is None and self._ranks:
            seconds = self._config.sync.deadline_seconds
            await self._call("discard", "giving up a version", seconds, each=[(version,)] * len(self._ranks))
        sending.result()

    async def save_checkpoint(self, directory: Path) -> None:
        """Write a checkpoint to `directory`, which appears complete or not at all."""
        await self._write(directory, "save_checkpoint", f"saving the checkpoint {directory}")

    async def load_checkpoint(self, directory: Path) -> None:
        """Continue from a checkpoint, bit for bit. Raises LearnerError if it was written by another set-up."""
        self._check_checkpoint(directory)
        await self._call(
            "load_checkpoint",
            f"loading the checkpoint {directory}",
            self._config.learner.step_seconds,
            each=[(str(directory.resolve()),)] * len(self._ranks),
        )

    async def export_huggingface(self, directory: Path) -> None:
        """Write the policy and its tokenizer as transformers and vLLM load them; complete or not at all."""
        await self._write(directory, "export_huggingface", f"exporting the model to {directory}", manifest=True)

    async def close(self) -> None:
        """Stop the ranks, dead or alive, and remove the weights that rank 0 has published. May be called twice."""
        ranks, self._ranks = self._ranks, []
        if ranks and self._failure is None:
            with suppress(TimeoutError, RayError):
                async with asyncio.timeout(GRACE_SECONDS):
                    await ranks[0].stop_publishing.remote()
        for rank in ranks:
            ray.kill(rank, no_restart=True)
        await asyncio.to_thread(self._remove_weights)

    def _remove_weights(self) -> None:
        """Those of a rank on this machine that was killed: its lock is free once its process is gone."""
        deadline = time.monotonic() + GRACE_SECONDS
        remove_weight_leftovers()
        while self._path is not None and self._path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            remove_weight_leftovers()

    def _actor_options(self, on_gpus: bool) -> dict[str, Any]:
        environment = {
            "OMP_NUM_THREADS": str(self._config.learner.threads_per_rank),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not on_gpus:
            environment["DS_ACCELERATOR"] = "cpu"
        return {
            # Ranks idle while replicas generate, so they share the CPUs of a small machine with them.
            "num_cpus": 0,
            "num_gpus": 1 if on_gpus else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": environment},
        }

    def _minibatches(self, groups: Sequence[Group], step: int) -> list[list[RankBatch]]:
        """[minibatch][rank]"""
        learner = self._config.learner
        groups = shaped_groups(groups, learner.overlong, self._config.rollout.max_response_tokens)
        parts = split_minibatches(
            groups, learner.advantage, learner.minibatches_per_step, self._config.seed, step, learner.overlong
        )
        if not parts:
            if not isinstance(learner.overlong, MaskOverlong):
                raise ValueError(f"step {step} has no response to learn from")
            # All were cut off. The optimizer takes its step with a gradient of 0, as for groups without signal.
            parts = [[]]
        # A KL to the start policy pulls at responses without an advantage, too.
        skip = learner.objective.kl_coefficient == 0.0
        return [rank_batches(part, learner.ranks, learner.tokens_per_microbatch, skip) for part in parts]

    def _check_checkpoint(self, directory: Path) -> None:
        path = directory / CHECKPOINT_DESCRIPTION
        if not path.is_file():
            raise LearnerError(f"{directory} is not a learner checkpoint: it has no {CHECKPOINT_DESCRIPTION}")
        found = json.loads(path.read_text())
        learner = self._config.learner
        expected = {
            "ranks": learner.ranks,
            "zero_stage": learner.zero_stage,
            "dtype": self._config.model.dtype,
        }
        differing = [
            f"{key} {found.get(key)} there, {value} here" for key, value in expected.items() if found.get(key) != value
        ]
        if differing:
            raise LearnerError(f"checkpoint {directory} was written by another set-up: {', '.join(differing)}")

    async def _write(self, directory: Path, method: str, what: str, manifest: bool = False) -> None:
        """Let the ranks write beside `directory`, then rename: an interruption leaves no half of it."""
        directory = directory.resolve()
        partial_directory = directory.with_name(f".{directory.name}.partial")
        await asyncio.to_thread(shutil.rmtree, partial_directory, ignore_errors=True)
        partial_directory.mkdir(parents=True)
        try:
            await self._call(
                method,
                what,
                self._config.learner.step_seconds,
                each=[(str(partial_directory),)] * len(self._ranks),
            )
            if manifest:
                await asyncio.to_thread(write_manifest, partial_directory)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, partial_directory, ignore_errors=True)
            raise
        await asyncio.to_thread(_publish, partial_directory, directory)

    async def _call(
        self, method: str, what: str, seconds: float, each: Sequence[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        """Call `method` on every rank, with its own arguments, and return their answers in order of rank."""
        if self._failure is not None:
            raise LearnerError(f"the learner has failed before: {self._failure}")
        if not self._ranks:
            raise LearnerError(f"{what}: the learner is not started")
        arguments = each if each is not None else [()] * len(self._ranks)
        waits = [
            asyncio.ensure_future(_answer(getattr(rank, method).remote(*own)))
            for rank, own in zip(self._ranks, arguments, strict=True)
        ]
        try:
            _, pending = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            errors = _errors(waits)
            if pending and errors and not any(isinstance(error, RayActorError) for error in errors.values()):
                await asyncio.wait(pending, timeout=GRACE_SECONDS)
                errors = _errors(waits)
            if errors or pending:
                waiting = [not wait.done() for wait in waits]
                failure = _failure(errors, waiting, what, seconds, self._config.learner)
                self._failure = str(failure)
                # Their peers would wait for the lost rank until the process group's own deadline.
                for rank in self._ranks:
                    ray.kill(rank, no_restart=True)
                raise failure
            return [wait.result() for wait in waits]
        finally:
            for wait in waits:
                wait.cancel()


async def _answer(reference: Any) -> Any:
    return await asyncio.wrap_future(reference.future())


def _errors(waits: Sequence["asyncio.Future[Any]"]) -> dict[int, BaseException]:
    """What ranks have failed with so far, by rank."""
    return {rank: error for rank, wait in enumerate(waits) if wait.done() and (error := wait.exception())}


def _failure(
    errors: Mapping[int, BaseException], waiting: Sequence[bool], what: str, seconds: float, learner: LearnerConfig
) -> LearnerError:
    """Which rank failed at `what`, and as `__cause__` with what: a dead one before the errors of its peers."""
    if not errors:
        missing = ", ".join(str(rank) for rank, waits in enumerate(waiting) if waits)
        return LearnerLost(f"{what}: no answer from learner rank {missing} within {seconds:g} s")
    rank = min(errors, key=lambda rank: (not isinstance(errors[rank], RayActorError), rank))
    error = errors[rank]
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(error, RayActorError):
        # A process that the kernel killed for its memory says nothing of it.
        advice = learner_advice(learner, ran_out_of_memory(str(error)))
        failure: LearnerError = LearnerLost(
            f"{what}: learner rank {rank} died: {str(error).strip().splitlines()[0]} ({advice})"
        )
    elif isinstance(cause, PolicyError):
        failure = LearnerError(str(cause))
    elif isinstance(cause, NotFiniteError):
        failure = LearnerError(
            f"{what}: {cause}. The checkpoint of the step before is not touched: --resume does this step again, --fork "
            "NAME goes on from there with other settings, such as a lower learning rate"
        )
    else:
        text = f"{type(cause).__name__}: {cause}"
        if ran_out_of_memory(text):
            text = f"{text.splitlines()[0]} ({learner_advice(learner, certain=True)})"
        failure = LearnerError(f"{what}: learner rank {rank} failed: {text}")
    failure.__cause__ = cause
    return failure


def trains_on_gpus(config: RunConfig, gpus: int) -> bool:
    """Whether each rank gets one of the cluster's GPUs; with too few a float32 model is trained on the CPUs.

    Raises LearnerError if they are too few for another one.
    """
    engine, ranks = config.rollout.engine, config.learner.ranks
    replicas = engine.gpus
    if gpus == 0 or gpus >= replicas + ranks:
        return gpus > 0
    if config.model.dtype != "float32":
        parallel = " x tensor_parallel_size" if engine.tensor_parallel_size > 1 else ""
        raise LearnerError(
            f"the cluster has {gpus} GPUs, fewer than rollout.engine.replicas{parallel} + learner.ranks "
            f"({replicas} + {ranks} = {replicas + ranks})"
        )
    return False


def environments(placements: Sequence[Placement], on_gpus: bool) -> list[dict[str, str]]:
    """What DeepSpeed and torch read of the environment, for each rank."""
    nodes = [placement.node for placement in placements]
    one_machine = len(set(nodes)) == 1
    result = []
    for rank, placement in enumerate(placements):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(placements)),
            # The number of the rank's device: Ray shows each actor its own GPU alone.
            "LOCAL_RANK": "0" if on_gpus else str(nodes[:rank].count(placement.node)),
            "LOCAL_SIZE": str(nodes.count(placement.node)),
            "MASTER_ADDR": "127.0.0.1" if one_machine else placements[0].address,
            "MASTER_PORT": str(placements[0].port),
        }
        if one_machine:
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        result.append(environment)
    return result


def _publish(partial_directory: Path, directory: Path) -> None:
    """Rename into place; an earlier `directory` is there until the new one is."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial_directory.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _step_metrics(
    minibatches: Sequence[Sequence[RankBatch]], results: Sequence[Sequence[MinibatchResult]], learner: LearnerConfig
) -> dict[str, float]:
    """Means over a step's minibatches. `minibatches`: [minibatch][rank]; `results`: [rank][minibatch]."""
    by_minibatch = list(zip(*results, strict=True))
    counts = [token_counts(batches) for batches in minibatches]
    real, padded = sum(c[0] for c in counts), sum(c[1] for c in counts)
    run = sum(len(samples) for batches in minibatches for batch in batches for samples in batch.microbatches)
    whole, first = ObjectiveStatistics(), ObjectiveStatistics()
    for index, parts in enumerate(by_minibatch):
        for part in parts:
            whole.add(part.statistics)
            if index == 0:
                first.add(part.statistics)
    values = {
        metrics.LOSS: math.fsum(p.loss for parts in by_minibatch for p in parts) / len(by_minibatch),
        metrics.GRADIENT_NORM: sum(parts[0].gradient_norm for parts in by_minibatch) / len(by_minibatch),
        metrics.LEARNING_RATE: by_minibatch[-1][0].learning_rate,
        metrics.CLIP_SHARE: whole.clipped_tokens / max(whole.tokens, 1),
        metrics.RATIO_MIN: whole.ratio_min,
        metrics.RATIO_MAX: whole.ratio_max,
        metrics.LEARNER_MEMORY: max(p.peak_bytes for parts in by_minibatch for p in parts) / 1024**3,
        metrics.PADDING_SHARE: 1.0 - real / padded,
        metrics.LEARNER_TOKENS: float(real),
        metrics.SKIPPED_SHARE: 1.0 - run / max(sum(batches[0].totals.responses for batches in minibatches), 1),
    }
    if learner.objective.kl_coefficient > 0.0:
        values[metrics.KL] = whole.kl_sum / max(whole.tokens, 1)
    # Against behaviour's log-probs only the first minibatch is of the policy before any update.
    gaps = (first if learner.old_logprobs == "behaviour" else whole).gaps
    values |= _gap_metrics(gaps)
    return values | _weight_metrics(whole.weights) if learner.importance_sampling.kind != "none" else values


def _gap_metrics(gaps: GapHistogram) -> dict[str, float]:
    """Without a token that was run there is nothing to tell: NaN."""
    return {
        metrics.LOGPROB_GAP_MEAN: gaps.mean,
        metrics.LOGPROB_GAP_P50: gaps.quantile(0.5),
        metrics.LOGPROB_GAP_P90: gaps.quantile(0.9),
        metrics.LOGPROB_GAP_P99: gaps.quantile(0.99),
        metrics.LOGPROB_GAP_P999: gaps.quantile(0.999),
        metrics.LOGPROB_GAP_MAX: gaps.max if gaps.tokens else math.nan,
        metrics.BEHAVIOUR_KL: gaps.kl,
    }


def _weight_metrics(weights: WeightStatistics) -> dict[str, float]:
    return {
        metrics.IMPORTANCE_WEIGHT_MEAN: weights.mean,
        metrics.IMPORTANCE_OUTLIER_SHARE: weights.outlier_share,
        metrics.IMPORTANCE_EFFECTIVE_SHARE: weights.effective_share,
    }
