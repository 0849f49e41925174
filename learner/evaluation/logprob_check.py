"""Do engines and learner agree about the log-probs of the same tokens under the same weights?

The engine's recorded log-probs are compared with the learner's, before anything is trained, and once more after one
training step and a weight sync. What counts as noise: see `limits`. Source of the method: ours.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.config.run import AdvantageConfig, NoOverlong, RunConfig, UniformCredit
from common.interfaces import Rollouts
from common.packed import Group, PackedResponse
from common.seeds import derive_seed
from common.trajectory import Prompt, ResponseRequest
from common.weights import WeightUpdate
from learner.loop.rollout import GRACE_SECONDS, Progress, generate_groups
from learner.policy.probe import SampleLogprobs
from learner.policy.samples import TrainingSample, response_samples

Floats = NDArray[np.float64]

NOISE_FACTOR = 4.0
"""How much further engine and learner may be apart than two batch shapes of the learner: the kernels differ too."""

FLOORS = {
    "float32": {"mean": 1e-5, "p99": 1e-4, "max": 1e-3},
    "bfloat16": {"mean": 3e-2, "p99": 3e-1, "max": 3.0},
}
"""What always counts as noise, in nats, since a batch shape may by chance not change any rounding.

A log-prob is off by about as much as its logit. float32 rounds a logit of 16 to 32 by up to 1e-6, and sums over
thousands of positions and tens of layers add a factor of 10 to 100. bfloat16 rounds it by up to 0.06, and hidden states
by 1/256 in every layer.
"""

COMMITTED, AFTER_ERASURE, ERASED = "committed", "after an erasure", "erased"


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far two log-probs of the same tokens are apart, in nats: |difference|, over `tokens` tokens."""

    tokens: int
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, one: Floats, other: Floats) -> "Gaps":
        """Infinite where one of the two is no number."""
        if not len(one):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        gaps = np.abs(one - other)
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        p50, p90, p99, p999, largest = (
            float(value) for value in np.quantile(gaps, [0.5, 0.9, 0.99, 0.999, 1.0], method="higher")
        )
        return cls(len(gaps), float(gaps.mean()), p50, p90, p99, p999, largest)

    def within(self, limits: dict[str, float]) -> bool:
        return all(getattr(self, name) <= limit for name, limit in limits.items())


def limits(dtype: str, noise: Gaps) -> dict[str, float]:
    """The largest mean, p99 and maximum that are noise: the floor of the type, or some times the measured noise."""
    return {name: max(floor, NOISE_FACTOR * getattr(noise, name)) for name, floor in FLOORS[dtype].items()}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Engines against learner under one version of the weights, by part of the responses and as a whole.

    `noise`: the learner against itself in other batches. `raw`: before temperature. `earlier_head`: the learner's with
    the output head of the version before.
    """

    name: str
    noise: Gaps
    limits: dict[str, float]
    parts: dict[str, Gaps]
    whole: Gaps
    raw: Gaps
    earlier_head: Gaps | None

    @property
    def agrees(self) -> bool:
        return all(gaps.within(self.limits) for gaps in self.parts.values())


@dataclass(slots=True)
class Result:
    """All comparisons, and what probably is wrong: nothing if they agree. `checksum`: of what was synced."""

    comparisons: list[Comparison] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    checksum: str | None = None

    @property
    def agrees(self) -> bool:
        return not self.causes

    def as_json(self) -> dict[str, Any]:
        comparisons = [asdict(one) | {"agrees": one.agrees} for one in self.comparisons]
        return {
            "agrees": self.agrees,
            "causes": self.causes,
            "checksum": self.checksum,
            "comparisons": comparisons,
        }


class Learner(Protocol):
    """What is asked of the learner: `learner.policy.probe.ProbeGroup` is one."""

    async def remember_head(self) -> None: ...
    async def measure(self, samples: Sequence[TrainingSample], *, alone: bool = False) -> list[SampleLogprobs]: ...
    async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]: ...
    def publishing(self, version: int) -> AbstractAsyncContextManager[WeightUpdate]: ...


def checked_config(config: RunConfig, rate: float) -> RunConfig:
    """The run's configuration with the one training step of a check: at `rate`, and whatever the run learns from."""
    optimizer = config.learner.optimizer.model_copy(
        update={"learning_rate": rate, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0}
    )
    learner = config.learner.model_copy(
        update={
            "optimizer": optimizer,
            "minibatches_per_step": 1,
            "overlong": NoOverlong(),
            "advantage": AdvantageConfig(credit=UniformCredit()),
            "objective": config.learner.objective.model_copy(update={"kl_coefficient": 0.0}),
        }
    )
    return config.model_copy(update={"learner": learner})


def check_requests(config: RunConfig, prompts: Sequence[Prompt], name: str) -> list[list[ResponseRequest]]:
    """A group for each prompt: every other response has each of its segments erased once, so that retries are seen."""
    rollout = config.rollout
    erasing = rollout.erasure.model_copy(update={"threshold": 0.0, "min_uncertainty": 0.0, "max_erasures": 1})
    return [
        [
            ResponseRequest(
                prompt_id=prompt.id,
                group_id=f"{name}-{prompt.id}",
                group_size=rollout.responses_per_group,
                sample=sample,
                seed=derive_seed(config.seed, "log-prob check", name, prompt.id, sample),
                prompt_token_ids=prompt.token_ids,
                max_tokens=rollout.max_response_tokens,
                temperature=rollout.temperature,
                policy=erasing,
                erasable=sample % 2 == 1,
            )
            for sample in range(rollout.responses_per_group)
        ]
        for prompt in prompts
    ]


async def check(
    config: RunConfig,
    rollouts: Rollouts,
    learner: Learner,
    prompts: Sequence[Prompt],
    tell: Callable[[str], object] = lambda phase: None,
) -> Result:
    """Compare, train one step on made-up rewards, sync, compare again. Both sides are started, with the same weights.

    If they differ at the start, weights are synced without training, which tells wrong weights from wrong arithmetic.
    """
    result = Result()
    tell("generating with the weights as loaded")
    first, groups = await _compare(config, rollouts, learner, prompts, "weights as loaded")
    result.comparisons.append(first)
    if not first.agrees:
        tell("syncing the learner's weights as they are")
        result.checksum = await _sync(config, rollouts, learner, 0)
        again, _ = await _compare(config, rollouts, learner, prompts, "same weights, synced")
        result.comparisons.append(again)
        result.causes = [start_cause(config, first, again)]
        return result
    await learner.remember_head()
    tell("training one step and syncing")
    metrics = await learner.train_step([_rewarded(group) for group in groups], 1)
    if not metrics["learner/gradient_norm"] > 0.0:
        result.causes = ["the training step had no gradient, so that a sync of changed weights was not checked"]
        return result
    result.checksum = await _sync(config, rollouts, learner, 1)
    tell("generating with the synced weights")
    second, _ = await _compare(config, rollouts, learner, prompts, "after a step and a sync")
    result.comparisons.append(second)
    if not second.agrees:
        result.causes = [sync_cause(second)]
    return result


async def _compare(
    config: RunConfig, rollouts: Rollouts, learner: Learner, prompts: Sequence[Prompt], name: str
) -> tuple[Comparison, list[Group]]:
    requests = check_requests(config, prompts, name)
    progress = Progress(config.rollout.engine.silence_seconds + GRACE_SECONDS)
    groups = await generate_groups(rollouts, prompts, requests, progress)
    samples, parts = labelled_samples(groups)
    together = await learner.measure(samples)
    alone = await learner.measure(samples, alone=True)
    return compare(config.model.dtype, name, together, alone, parts), groups


async def _sync(config: RunConfig, rollouts: Rollouts, learner: Learner, version: int) -> str:
    async with learner.publishing(version) as update:
        report = await rollouts.sync(update, config.sync.deadline_seconds)
    return report.replicas[0].checksum


def _rewarded(group: Group) -> Group:
    for response in group.trajectories:
        response.reward = float(response.sample % 2)
    return group


def labelled_samples(groups: Sequence[Group]) -> tuple[list[TrainingSample], list[NDArray[np.str_]]]:
    """Every token of the responses once, as samples, and for each of its tokens which part it is of."""
    config = AdvantageConfig(credit=UniformCredit(), erased_weight=1.0)
    samples: list[TrainingSample] = []
    labels: list[NDArray[np.str_]] = []
    for group in groups:
        responses = _rewarded(group).trajectories
        for response, own in zip(responses, response_samples(responses, config), strict=True):
            for number, sample in enumerate(own):
                samples.append(sample)
                is_committed = number == 0 and response.response_tokens > 0
                labels.append(_labels(response, sample.response_length, is_committed))
    return samples, labels


def _labels(response: PackedResponse, tokens: int, is_committed: bool) -> NDArray[np.str_]:
    if not is_committed:
        return np.full(tokens, ERASED)
    erased = response.attempts.starts[response.attempts.erased]
    first = int(erased.min()) if len(erased) else tokens
    return np.where(np.arange(tokens) < first, COMMITTED, AFTER_ERASURE)


def compare(
    dtype: str,
    name: str,
    together: Sequence[SampleLogprobs],
    alone: Sequence[SampleLogprobs],
    labels: Sequence[NDArray[np.str_]],
) -> Comparison:
    """The gaps of all samples, `together` as training batches them and `alone`, and what they are measured against."""

    def joined(samples: Sequence[SampleLogprobs], column: str) -> Floats:
        return np.concatenate([getattr(sample, column) for sample in samples])

    behaviour, learner, part = joined(together, "behaviour"), joined(together, "learner"), np.concatenate(labels)
    noise = Gaps.of(learner, joined(alone, "learner"))
    parts = {
        label: Gaps.of(behaviour[part == label], learner[part == label]) for label in (COMMITTED, AFTER_ERASURE, ERASED)
    }
    has_head = together[0].earlier_head is not None
    return Comparison(
        name=name,
        noise=noise,
        limits=limits(dtype, noise),
        parts=parts,
        whole=Gaps.of(behaviour, learner),
        raw=Gaps.of(joined(together, "engine"), joined(together, "learner_raw")),
        earlier_head=Gaps.of(behaviour, joined(together, "earlier_head")) if has_head else None,
    )


def start_cause(config: RunConfig, first: Comparison, synced: Comparison) -> str:
    """Why engines and learner differ before any training, from what a sync of the same weights changed."""
    if synced.agrees:
        return (
            f"the engines loaded other weights than the learner: after a sync they agree. Compare model.path "
            f"({config.model.path}), its revision, and what each replica's machine has there"
        )
    return _arithmetic_cause(first)


def sync_cause(second: Comparison) -> str:
    """Why they differ after a sync, though they agreed before it and the checksum of what arrived was right."""
    if second.earlier_head is not None and second.earlier_head.within(second.limits):
        return (
            "the engines use the output head of the weights before the sync: its packed copy was not made anew "
            "(tied embeddings on vLLM's CPU backend need that)"
        )
    if _differs_in_parts_alone(second) or second.raw.within(second.limits):
        return _arithmetic_cause(second)
    return (
        "the engines do not compute with the weights that they received, whose checksum is right: a packed copy, a "
        "prefix cache or a CUDA graph still has earlier ones"
    )


def _arithmetic_cause(comparison: Comparison) -> str:
    if comparison.raw.within(comparison.limits):
        return (
            "the log-probs before temperature agree, those at the token's temperature do not: the engine samples from "
            "another distribution than it is asked to (temperature, truncation, penalties)"
        )
    if _differs_in_parts_alone(comparison):
        return (
            "only tokens of or after erased attempts differ: something of an erased attempt is still in the KV cache, "
            "or attempts are recorded at the wrong place"
        )
    return (
        "engine and learner compute the same weights differently: compare dtype, quantisation, RoPE scaling and "
        "attention of the two, and whether the model's code (trust_remote_code) is the same"
    )


def _differs_in_parts_alone(comparison: Comparison) -> bool:
    plain = comparison.parts[COMMITTED]
    return plain.tokens > 0 and plain.within(comparison.limits)
