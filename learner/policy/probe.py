"""Learner ranks that also say what they make of given tokens: what `learner.check_logprobs` compares with the engines.

A part of `LearnerRank` that training does not need.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.packed import gathered
from learner.objectives import MinibatchTotals
from learner.policy.batching import MicroBatch, RankBatch, collate, plan_microbatches, with_tokens
from learner.policy.group import LearnerGroup
from learner.policy.model import response_logprobs
from learner.policy.rank import LearnerRank
from learner.policy.samples import TrainingSample

Floats = NDArray[np.float64]

_NO_TOTALS = MinibatchTotals(0, 0)


@dataclass(frozen=True, slots=True)
class SampleLogprobs:
    """Log-probs of the tokens of one sample that carry loss, each [response].

    `behaviour`, `engine`: as the engine recorded them, at the token's temperature and before any. `learner`,
    `learner_raw`: the learner's of both. `earlier_head`: the learner's with the output head that was remembered; None
    if none was.
    """

    behaviour: Floats
    engine: Floats
    learner: Floats
    learner_raw: Floats
    earlier_head: Floats | None


@torch.no_grad()
def measure(
    model: Any, samples: Sequence[TrainingSample], device: torch.device, head: Tensor | None, module: nn.Module
) -> list[SampleLogprobs]:
    """What `model` makes of one micro-batch. `head`: an output head to compute everything with once more."""
    batch = collate(samples).to(device)
    at_temperature = _rows(response_logprobs(model, batch), batch)
    raw = _rows(response_logprobs(model, replace(batch, temperatures=torch.ones_like(batch.temperatures))), batch)
    earlier: Sequence[Floats | None] = [None] * len(samples)
    if head is not None:
        with _headed(module, head):
            earlier = _rows(response_logprobs(model, batch), batch)
    return [
        SampleLogprobs(
            sample.behaviour_logprobs.astype(np.float64),
            gathered(sample.tokens.logprobs, sample.response).astype(np.float64),
            at_temperature[row],
            raw[row],
            earlier[row],
        )
        for row, sample in enumerate(samples)
    ]


def _rows(logprobs: Tensor, batch: MicroBatch) -> list[Floats]:
    return [row[mask].double().cpu().numpy() for row, mask in zip(logprobs, batch.mask, strict=True)]


def output_head(module: nn.Module) -> nn.Parameter | None:
    """The weights that make logits of hidden states; None if the model does not say which these are."""
    get: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
    layer = get() if get is not None else None
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


@contextmanager
def _headed(module: Any, head: Tensor) -> Iterator[None]:
    """The model with another output head, whether or not its own is tied to the embeddings."""

    def logits(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return inputs[0] @ head.T

    handle = module.get_output_embeddings().register_forward_hook(logits)
    try:
        yield
    finally:
        handle.remove()


class ProbeRank(LearnerRank):
    """A learner rank that also measures. Its methods are collective, too."""

    _head: Tensor | None = None

    def remember_head(self) -> None:
        """Keep the output head as it is now."""
        import deepspeed

        head = output_head(self._engine.module)
        if head is not None:
            with deepspeed.zero.GatheredParameters([head], enabled=self._stage == 3):
                self._head = head.detach().clone()

    def measure(self, batch: RankBatch) -> list[list[SampleLogprobs]]:
        """Of each micro-batch each sample's log-probs under the current weights."""
        (whole,) = with_tokens([batch], self._fetch)
        module = self._engine.module
        return [measure(self._engine, samples, self._device, self._head, module) for samples in whole.microbatches]


class ProbeGroup(LearnerGroup):
    """A learner that can be asked for log-probs."""

    rank_class = ProbeRank

    async def remember_head(self) -> None:
        """Later measurements are also made with the output head as it is now."""
        await self._call("remember_head", "keeping the output head", self._config.learner.step_seconds)

    async def measure(self, samples: Sequence[TrainingSample], *, alone: bool = False) -> list[SampleLogprobs]:
        """Each sample's log-probs: batched as in training, or `alone`, each in a micro-batch of its own."""
        learner = self._config.learner
        lengths = [len(sample) for sample in samples]
        plan = plan_microbatches(lengths, learner.ranks, learner.tokens_per_microbatch)
        if alone:
            each = -(-len(samples) // learner.ranks)
            plan = [
                [[i] if i < len(samples) else [] for i in range(r * each, (r + 1) * each)] for r in range(len(plan))
            ]
        work = [(RankBatch([[samples[i] for i in batch] for batch in own], _NO_TOTALS),) for own in plan]
        what = "computing log-probs"
        results: list[list[list[SampleLogprobs]]] = await self._call("measure", what, learner.step_seconds, each=work)
        found: dict[int, SampleLogprobs] = {}
        for own, measured in zip(plan, results, strict=True):
            for batch, of_batch in zip(own, measured, strict=True):
                found |= dict(zip(batch, of_batch, strict=True))
        return [found[index] for index in range(len(samples))]
