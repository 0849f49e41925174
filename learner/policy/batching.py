"""From groups to padded micro-batches: what each rank runs through the model in one optimizer step."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config.run import AdvantageConfig, Overlong
from common.packed import Fetch, Group, TokenArrays
from common.seeds import derive_seed
from learner.objectives import MinibatchTotals
from learner.policy.samples import NO_OVERLONG, TrainingSample, response_samples

PADDING_TARGET = 0.08
"""Padding share up to which fewer micro-batches are preferred to less padding."""

BISECTIONS = 12

EMPTY_TOKENS = 2
"""Tokens that a micro-batch without samples runs through the model."""


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's part of a minibatch: its micro-batches (an empty one keeps ranks in step), and the totals of all."""

    microbatches: list[list[TrainingSample]]
    totals: MinibatchTotals


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Padded tensors of a micro-batch, B sequences of T tokens, of which positions `first` to T-1 predict a response.

    `token_ids`: [B, T]. The others, [B, T - first - 1], are aligned with the predicted tokens `first + 1` to T.
    """

    token_ids: Tensor
    first: int
    targets: Tensor
    mask: Tensor
    behaviour_logprobs: Tensor
    temperatures: Tensor
    advantages: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved)


def split_minibatches(
    groups: Sequence[Group],
    config: AdvantageConfig,
    minibatches: int,
    seed: int,
    step: int,
    overlong: Overlong = NO_OVERLONG,
) -> list[list[TrainingSample]]:
    """The samples of a rollout in at most `minibatches` parts, shuffled by `seed` and `step` alone.

    Groups stay whole, so that each part keeps their baseline; only where there are fewer groups than parts are
    responses dealt out one by one. Parts without a sample are left out.
    """
    by_group = [response_samples(group.trajectories, config, overlong) for group in groups]
    units = [[sample for response in group for sample in response] for group in by_group]
    if len(units) < minibatches:
        units = [response for group in by_group for response in group]
    order = np.random.default_rng(derive_seed(seed, "minibatch", step)).permutation(len(units))
    parts = [[sample for index in chosen for sample in units[index]] for chosen in np.array_split(order, minibatches)]
    return [part for part in parts if part]


def plan_microbatches(lengths: Sequence[int], ranks: int, tokens_per_microbatch: int) -> list[list[list[int]]]:
    """For each rank the micro-batches that it runs, each a list of indices into `lengths`.

    Sequences are sorted by length and cut into few micro-batches, as long as no more than `PADDING_TARGET` of the
    padded tokens is padding. Each rank gets as many as the others and about as many tokens; where there are too few
    sequences for that, some are empty. Raises ValueError if a sequence exceeds the budget.
    """
    longest = max(lengths, default=0)
    if longest > tokens_per_microbatch:
        raise ValueError(
            f"a sequence of {longest} tokens does not fit into learner.tokens_per_microbatch ({tokens_per_microbatch})"
        )
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    cuts = _few_cuts(np.array([lengths[i] for i in order], dtype=np.float64), tokens_per_microbatch)
    microbatches = [order[start:end] for start, end in itertools.pairwise(cuts)]
    while len(microbatches) % ranks and any(len(batch) > 1 for batch in microbatches):
        largest = max(microbatches, key=lambda batch: (len(batch) > 1, len(batch) * lengths[batch[0]]))
        half = len(largest) // 2
        microbatches.remove(largest)
        microbatches += [largest[:half], largest[half:]]
    microbatches += [[] for _ in range(-len(microbatches) % ranks)]
    return _deal(microbatches, lengths, ranks)


def _few_cuts(sorted_lengths: NDArray[np.float64], budget: int) -> list[int]:
    """Where to cut sequences sorted from long to short: few micro-batches within the padding target.

    A micro-batch is charged its padded tokens and an overhead; the more overhead, the fewer micro-batches and the
    more padding. Bisects for the overhead.
    """
    real = sorted_lengths.sum()
    low, high = 1.0, float(budget * max(len(sorted_lengths), 1))
    cuts, padded = _cheapest_cuts(sorted_lengths, budget, high)
    if real >= (1.0 - PADDING_TARGET) * padded:
        return cuts
    cuts, _ = _cheapest_cuts(sorted_lengths, budget, 0.0)
    for _ in range(BISECTIONS):
        middle = float(np.sqrt(low * high))
        tried, padded = _cheapest_cuts(sorted_lengths, budget, middle)
        if real >= (1.0 - PADDING_TARGET) * padded:
            low, cuts = middle, tried
        else:
            high = middle
    return cuts


def _cheapest_cuts(sorted_lengths: NDArray[np.float64], budget: int, overhead: float) -> tuple[list[int], float]:
    """The cuts with the least padded tokens plus `overhead` for each micro-batch, and those padded tokens."""
    n = len(sorted_lengths)
    cost, begins = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    rows = np.arange(n, 0, -1, dtype=np.float64)
    first = 0
    for end in range(1, n + 1):
        while (end - first) * sorted_lengths[first] > budget:
            first += 1
        # rows[n - k] is k: as many rows as a micro-batch from each possible beginning to here has.
        candidates = cost[first:end] + rows[n - end + first :] * sorted_lengths[first:end]
        best = int(candidates.argmin())
        cost[end] = candidates[best] + overhead
        begins[end] = first + best
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(begins[cuts[-1]]))
    return cuts[::-1], float(cost[n] - overhead * (len(cuts) - 1))


def _deal(microbatches: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """The same number of micro-batches to each rank: the largest first, to the rank with the fewest tokens so far."""
    each = len(microbatches) // ranks

    def padded(batch: list[int]) -> int:
        return len(batch) * max((lengths[i] for i in batch), default=0)

    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for batch in sorted(microbatches, key=padded, reverse=True):
        rank = min((r for r in range(ranks) if len(dealt[r]) < each), key=lambda r: (tokens[r], r))
        dealt[rank].append(batch)
        tokens[rank] += padded(batch)
    return dealt


def rank_batches(
    samples: Sequence[TrainingSample], ranks: int, tokens_per_microbatch: int, skip_without_signal: bool = False
) -> list[RankBatch]:
    """A minibatch's samples, distributed over the ranks. Each rank has at least one micro-batch, if an empty one.

    `skip_without_signal`: samples whose advantages are all 0 are not run. A loss that is a product with the advantage
    is 0 for them, and so is its gradient; they stay in `totals`, which the other samples' losses are divided by.
    """
    totals = MinibatchTotals(len(samples), sum(sample.response_length for sample in samples))
    run = [sample for sample in samples if sample.has_signal] if skip_without_signal else samples
    plan = plan_microbatches([len(sample) for sample in run], ranks, tokens_per_microbatch)
    return [RankBatch([[run[i] for i in batch] for batch in batches] or [[]], totals) for batches in plan]


def with_tokens(batches: Sequence[RankBatch], fetch: Fetch) -> list[RankBatch]:
    """The samples with arrays in the place of references, each of which is fetched once, and all together."""
    samples = [sample for batch in batches for microbatch in batch.microbatches for sample in microbatch]
    wanted = list(dict.fromkeys(s.tokens for s in samples if not isinstance(s.tokens, TokenArrays)))
    found = dict(zip(wanted, fetch(wanted), strict=True)) if wanted else {}
    return [
        replace(
            batch,
            microbatches=[
                [s if isinstance(s.tokens, TokenArrays) else replace(s, tokens=found[s.tokens]) for s in microbatch]
                for microbatch in batch.microbatches
            ],
        )
        for batch in batches
    ]


def token_counts(batches: Sequence[RankBatch]) -> tuple[int, int]:
    """Tokens of a minibatch over all ranks: without padding, and with it."""
    real = padded = 0
    for batch in batches:
        for microbatch in batch.microbatches:
            real += sum(len(sample) for sample in microbatch)
            padded += len(microbatch) * max((len(sample) for sample in microbatch), default=0)
            padded += 0 if microbatch else EMPTY_TOKENS
    return real, padded


def collate(samples: Sequence[TrainingSample]) -> MicroBatch:
    """Pad on the right, so that a causal model needs no attention mask: no real token sees padding.

    Without samples: two tokens that predict nothing, for a rank that must keep in step with the others.
    """
    if not samples:
        zeros = torch.zeros((1, 1))
        return MicroBatch(
            torch.zeros((1, EMPTY_TOKENS), dtype=torch.int64),
            0,
            torch.zeros((1, 1), dtype=torch.int64),
            torch.zeros((1, 1), dtype=torch.bool),
            zeros,
            torch.ones((1, 1)),
            zeros,
        )
    rows, width = len(samples), max(len(sample) for sample in samples)
    first = min(sample.context_length for sample in samples) - 1
    token_ids = np.zeros((rows, width), dtype=np.int64)
    mask = np.zeros((rows, width), dtype=np.bool_)
    values = np.zeros((3, rows, width), dtype=np.float32)
    values[1] = 1.0
    for row, sample in enumerate(samples):
        response = slice(sample.context_length, len(sample))
        token_ids[row, : len(sample)] = sample.token_ids
        mask[row, response] = True
        values[0, row, response] = sample.behaviour_logprobs
        values[1, row, response] = sample.temperatures
        values[2, row, response] = sample.advantages
    predicted = slice(first + 1, width)
    behaviour_logprobs, temperatures, advantages = torch.from_numpy(values[:, :, predicted])
    tokens = torch.from_numpy(token_ids)
    return MicroBatch(
        tokens,
        first,
        tokens[:, predicted],
        torch.from_numpy(mask[:, predicted]),
        behaviour_logprobs,
        temperatures,
        advantages,
    )
