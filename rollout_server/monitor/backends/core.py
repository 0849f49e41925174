"""The segment monitor's core: measures uncertainty, judges segments and says which rows to force to a sentinel.

Nothing here knows vLLM, and no step waits for the device. Adapters give it the rows of a batch as slots: `observe`
takes the tokens that the last step sampled, `prepare` the logits from which the next ones will be sampled.
Mathematics: `algorithm.md`, sections 2 to 5; reference: `common.uncertainty` and `common.threshold`.

What is as wide as the vocabulary is in torch tensors on the device of the logits. The slots' state is in arrays of
`xp`: numpy's on CPU, where `host.observe` reads them in a compiled loop, torch's elsewhere, where `judge` is used; the
rest is written in what both spell alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rollout_server.monitor.backends.judge import columns, judge, uncertainty_parts
from rollout_server.monitor.layout import NO_SENTINEL, Int, Judged, Past, Real, SlotSpec

Array = Any
"""An array of numpy's or a tensor of torch's."""


class SegmentMonitor:
    """State of all followed responses, a slot each, and the statistics of their groups.

    `sentinels`: the token ids that are forced to end a request, (erase, finish). `token_bytes`: what each token adds to
    a text, in which delimiters are looked for (`common.token_bytes`). All capacities grow on demand.
    `on_host`: the slots' state is in numpy arrays, and a step looks at which rows matter: free on CPU, a wait for the
    device elsewhere. By default as `device` is.
    """

    def __init__(
        self,
        vocabulary: int,
        device: torch.device,
        sentinels: tuple[int, int],
        token_bytes: Sequence[bytes],
        slots: int = 64,
        on_host: bool | None = None,
    ) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self.sentinels = sentinels
        self.on_host = device.type == "cpu" if on_host is None else on_host
        self._xp: Any = np if self.on_host else torch
        self._place: Any = "cpu" if self.on_host else device
        whole, short = self._xp.int64, self._xp.float32
        self._sentinel_ids = torch.tensor(sentinels, device=device)
        self._logprobs = torch.zeros(slots, vocabulary, device=device)
        """Of the rows that were prepared last, in their order; `_row` says where those of a slot are."""
        self._rows_used = 0
        self._kept: dict[int, torch.Tensor] = {}
        self._row = self._zeros(slots, dtype=whole)
        self._behaviour_normaliser = self._zeros(slots, dtype=short)
        self._entropy = self._zeros(slots, dtype=short)
        self._count = self._zeros(slots, dtype=whole)
        """Tokens of the segment under way."""
        self._token_logprobs = self._zeros(slots, 1, dtype=short)
        self._token_behaviours = self._zeros(slots, 1, dtype=short)
        self._token_signals = self._zeros(slots, 1, dtype=short)
        self._ints = self._zeros(slots, len(Int), dtype=whole)
        self._past = self._zeros(slots, len(Past))
        self._reals = self._zeros(slots, len(Real))
        self._forced = self._zeros(slots, dtype=whole) + NO_SENTINEL
        self._token_tables = self._zeros(1, vocabulary, dtype=self._xp.bool)
        self._groups = self._zeros(8, 1, 3)
        self._priors = self._zeros(1, 1, 3)
        self._tempered: set[int] = set()
        self._retempered: set[int] = set()
        self._entropic: set[int] = set()
        # Imported here: numba takes half a second, which only workers need to spend. Compiled here, or loaded from
        # where that is kept, rather than in a request's first step.
        from rollout_server.monitor.backends.boundaries import Boundaries

        self._boundaries = Boundaries(token_bytes, vocabulary, slots)
        if self.on_host:
            from rollout_server.monitor.backends import host

            self._observe_rows = host.observe
            nothing = torch.empty(0, dtype=torch.int64)
            self.observe(nothing, nothing)

    @property
    def capacity(self) -> int:
        """Slots that exist."""
        return len(self._forced)

    def add_token_table(self, token_ids: torch.Tensor, replaced: int | None = None) -> int:
        """A table of the tokens that end a response; returns the row that names it. Row 0 is empty.

        `replaced`: the row of a table that no slot needs any more.
        """
        row = self._zeros(1, self.vocabulary, dtype=self._xp.bool)
        row[0, self._array(token_ids, self._xp.int64)] = True
        if replaced is not None:
            self._token_tables[replaced] = row[0]
            return replaced
        self._token_tables = self._xp.concatenate([self._token_tables, row])
        return len(self._token_tables) - 1

    def open_group(self, group: int) -> None:
        """Start the statistics of a group's row afresh."""
        self._groups = _grown(self._groups, 0, group + 1)
        self._groups[group] = 0.0

    def close_group(self, group: int, prior: int, decay: float) -> None:
        """Fold a finished group's statistics into its prior (`common.threshold.updated_prior`)."""
        where, stack = self._xp.where, self._xp.stack
        count = self._groups[group, :, 0]
        weight = count.clip(1.0)
        mean, second = self._groups[group, :, 1] / weight, self._groups[group, :, 2] / weight
        known, old_mean, old_second = self._priors[prior].T
        keep = decay * self._array(known > 0)
        ones = self._xp.ones_like(known)
        updated = stack([ones, keep * old_mean + (1 - keep) * mean, keep * old_second + (1 - keep) * second], 1)
        self._priors[prior] = where((count > 0)[:, None], updated, self._priors[prior])

    def clear_prior(self, prior: int) -> None:
        """Forget what a prior's row holds, or make the row."""
        self._priors = _grown(self._priors, 0, prior + 1)
        self._priors[prior] = 0.0

    def prior(self, prior: int) -> list[list[float]]:
        """A prior's row, `[segments, 3]`: whether it is known, mean and second moment of U."""
        known = self._priors[prior]
        values: list[list[float]] = known[: int((known[:, 0] > 0).sum())].tolist()
        return values

    def set_prior(self, prior: int, values: list[list[float]]) -> None:
        """Put back what `prior` returned."""
        self.clear_prior(prior)
        self._priors = _grown(self._priors, 1, len(values))
        self._groups = _grown(self._groups, 1, len(values))
        if values:
            self._priors[prior, : len(values)] = self._array(values)

    def open(self, slot: int, spec: SlotSpec) -> None:
        """Follow a response in `slot` from `spec.position` on; whatever the slot held is forgotten."""
        policy = spec.policy
        self._reserve(slot, spec)
        retry = policy.retry_temperature if policy.retry_temperature is not None else spec.temperature
        history = spec.history
        self._ints[slot] = self._array(
            [
                spec.position, spec.segment, spec.attempt, spec.erased_tokens, policy.window,
                spec.limit, spec.stops, spec.group, spec.prior,
                policy.max_erasures if spec.erasable else 0, spec.erased_limit,
                policy.observe == "all", policy.signal == "entropy", policy.statistics == "index",
            ],
            self._xp.int64,
        )  # fmt: skip
        self._past[slot] = self._array([history.uncertainty, history.mean, history.deviation])
        self._reals[slot] = self._array(
            [
                policy.weights.base, policy.weights.extreme, policy.weights.gradient,
                policy.kappa, policy.gamma, policy.eta,
                math.nan if policy.threshold is None else policy.threshold,
                policy.prior_strength, spec.temperature, retry, spec.engine_temperature,
                policy.min_uncertainty, spec.best,
            ]
        )  # fmt: skip
        self._count[slot] = 0
        self._forced[slot] = NO_SENTINEL
        self.close(slot)
        self._boundaries.open(slot, policy.segmentation, spec.limit - spec.position)
        if spec.temperature != 1.0 or retry != 1.0:
            self._tempered.add(slot)
        if retry != spec.temperature:
            self._retempered.add(slot)
        if policy.signal == "entropy":
            self._entropic.add(slot)

    def close(self, slot: int) -> None:
        """Stop following the response in `slot`."""
        self._kept.pop(slot, None)
        self._boundaries.close(slot)
        for special in (self._tempered, self._retempered, self._entropic):
            special.discard(slot)

    def leave(self, slot: int) -> None:
        """The response leaves the batch for a while, before `observe` had the token that was sampled for it last."""
        row = self._row[slot : slot + 1]
        self._kept[slot] = self._logprobs[self._tensor(row)]

    def enter(self, slot: int) -> None:
        """A response that left is back: `observe` may have its token."""
        logprobs = self._kept.pop(slot, None)
        if logprobs is None:
            return
        self._logprobs = _grown(self._logprobs, 0, self._rows_used + 1)
        self._logprobs[self._rows_used] = logprobs[0]
        self._row[slot] = self._rows_used
        self._rows_used += 1

    def _reserve(self, slot: int, spec: SlotSpec) -> None:
        tokens = ("_token_logprobs", "_token_behaviours", "_token_signals")
        slots = ("_row", "_behaviour_normaliser", "_entropy", "_count", "_ints", "_past", "_reals", "_forced")
        for name in tokens + slots:
            setattr(self, name, _grown(getattr(self, name), 0, slot + 1))
        segmentation = spec.policy.segmentation
        for name in tokens:
            setattr(self, name, _grown(getattr(self, name), 1, min(segmentation.max_length, spec.limit)))
        segments = -(-spec.limit // segmentation.min_length) if spec.policy.statistics == "index" else 1
        self._groups = _grown(self._groups, 1, segments)
        self._priors = _grown(self._priors, 1, segments)

    def observe(self, slots: torch.Tensor, tokens: torch.Tensor) -> Judged | None:
        """Take the tokens `[rows]` that were sampled from the logits last given for `slots` `[rows]`, both on the host.

        Returns the judgements of the segments that ended, or None. On a GPU every row is returned, the column
        `Field.JUDGED` saying which count, so that the host need not know.
        """
        ends = self._boundaries.take(slots.numpy(), tokens.numpy())
        if self.on_host:
            return self._observe_on_host(slots.numpy(), tokens.numpy(), ends)
        slots, tokens, ended = torch.stack([slots, tokens, torch.from_numpy(ends).long()]).to(self.device)
        # An engine that runs ahead steps a row on after its sentinel, before it takes it out.
        running = self._forced[slots] < 0
        count = self._count[slots] + running
        self._count[slots] = count
        self._measure(slots, tokens, (count - 1).clip(0))
        stopped = self._token_tables[self._ints[slots, Int.STOPS], tokens]
        return self._conclude(slots, count, stopped, (stopped | (ended > 0)) & running)

    def _observe_on_host(self, slots: np.ndarray, tokens: np.ndarray, ends: np.ndarray) -> Judged | None:
        judged, fields, per_token = self._observe_rows(
            slots, tokens, ends, self._logprobs.numpy(), self._row, self._behaviour_normaliser, self._entropy,
            self._count, self._token_logprobs, self._token_behaviours, self._token_signals, self._token_tables,
            self._ints, self._past, self._reals, self._forced, self._groups, self._priors, *self.sentinels,
        )  # fmt: skip
        if len(judged) == 0:
            return None
        return Judged(torch.from_numpy(judged), torch.from_numpy(fields), torch.from_numpy(per_token))

    def _measure(self, slots: torch.Tensor, tokens: torch.Tensor, place: torch.Tensor) -> None:
        """Keep what is needed of the sampled tokens, `[rows]`, at their places in their segments."""
        ints = self._ints[slots]
        logprob = self._logprobs[self._row[slots], tokens]
        temperature = self._temperature(ints, self._reals[slots])
        tempered = (logprob / temperature.clip(1e-5) - self._behaviour_normaliser[slots]) * (temperature > 0.0)
        self._token_logprobs[slots, place] = logprob
        self._token_behaviours[slots, place] = torch.where(temperature == 1.0, logprob, tempered).float()
        self._token_signals[slots, place] = torch.where(ints[:, Int.USES_ENTROPY] > 0, self._entropy[slots], -logprob)

    def _conclude(self, slots: torch.Tensor, count: torch.Tensor, stopped: torch.Tensor, ended: torch.Tensor) -> Judged:
        """Judge the segments that `ended` (all arguments are rows of the batch) and move their slots on.

        An accepted segment becomes history and the next one begins. A slot that is erased or final is forced to its
        sentinel from now on: its request ends, and what follows an erasure is a new request in a new slot.
        """
        where = torch.where
        ints, reals, past = self._ints[slots], self._reals[slots], self._past[slots]
        temperature = self._temperature(ints, reals)
        tokens = torch.stack(
            [self._token_logprobs[slots], self._token_behaviours[slots], self._token_signals[slots]], 2
        )
        parts = uncertainty_parts(tokens[:, :, 2].double(), count, ints[:, Int.WINDOW], reals)
        statistics = self._observe_group(ints, reals, parts[0], ended)
        verdict = judge(count, ints, past, reals, parts, statistics, ended)
        position = ints[:, Int.START] + count
        final = stopped | (position >= ints[:, Int.LIMIT])
        fields = torch.cat([verdict.fields, columns([temperature, final, ended])], 1)
        erase, finish = self.sentinels
        forced = where(verdict.erased, erase, where(ended & final, finish, NO_SENTINEL))
        self._forced[slots] = self._forced[slots].maximum(forced)
        accepted = ended & ~verdict.erased
        self._past[slots] = where(accepted[:, None], past + verdict.history, past)
        ints[:, Int.START] = where(accepted, position, ints[:, Int.START])
        # Not after the last one: an engine that runs ahead looks a row's segment up after its sentinel too.
        ints[:, Int.SEGMENT] += accepted & ~final
        ints[:, Int.ATTEMPT] *= ~accepted
        self._ints[slots] = ints
        self._count[slots] = count * ~ended
        return Judged(slots, fields, tokens)

    def _observe_group(
        self, ints: torch.Tensor, reals: torch.Tensor, uncertainty: torch.Tensor, ended: torch.Tensor
    ) -> torch.Tensor:
        """Count the segments that ended in their groups; statistics after that, `[rows, 6]` as `GroupStatistics`.

        Segments that end in the same step see each other, whatever their order in the batch.
        """
        group, place = ints[:, Int.GROUP], ints[:, Int.SEGMENT] * ints[:, Int.BY_INDEX]
        observed = ended & ((ints[:, Int.ATTEMPT] == 0) | (ints[:, Int.OBSERVE_ALL] > 0))
        # Of weights that overflowed nothing is learnt: it would outlast them.
        observed &= uncertainty.isfinite()
        moments = columns([torch.ones_like(uncertainty), uncertainty, uncertainty**2])
        moments = torch.where(observed[:, None], moments, 0.0)
        self._groups.index_put_((group, place), moments, accumulate=True)
        n, total, squares = self._groups[group, place].T
        mean = total / n.clip(1.0)
        variance = (squares / n.clip(1.0) - mean**2).clip(0.0)
        known, prior_mean, prior_second = self._priors[ints[:, Int.PRIOR], place].T
        strength = known * reals[:, Real.PRIOR_STRENGTH]
        prior_variance = (prior_second - prior_mean**2).clip(0.0)
        return columns([n, mean, variance, strength, prior_mean, prior_variance])

    def prepare(
        self,
        slots: torch.Tensor,
        logits: torch.Tensor,
        rows: torch.Tensor | None,
        adjust: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor | None:
        """Keep what is needed of the logits and force sentinels, in place, before the engine samples.

        `logits` float32 `[batch, vocabulary]`; `slots` `[rows]` are the followed rows, `rows` where they are in the
        batch (None: they are the batch). The distribution that is measured is the model's own: before `adjust` changes
        the rows `[rows, vocabulary]` in place, before sentinels are masked and before temperature.

        Returns which rows `[rows]` got logits that are not finite: they are forced to the finish sentinel. None if it
        is known that there are none.
        """
        own = logits if rows is None else logits[rows]
        own_slots = self._own(slots)
        self._logprobs = _grown(self._logprobs, 0, len(own))
        logprobs = self._logprobs[: len(own)]
        # Without `out` a CPU spends more time on fresh pages than on this.
        torch.log_softmax(own, 1, out=logprobs)
        self._rows_used = len(own)
        self._row[own_slots] = self._xp.arange(len(own), device="cpu" if self.on_host else self.device)
        broken = self._end_broken(own_slots, logprobs)
        if self._entropic:
            self._entropy[own_slots] = self._own(-(logprobs.exp() * logprobs).nan_to_num(0.0).sum(dim=1))
        temperature = None
        if self._tempered:
            temperature = self._tensor(self._temperature(self._ints[own_slots], self._reals[own_slots])).float()
            tempered = logprobs / temperature.clamp(min=1e-5).unsqueeze(1)
            self._behaviour_normaliser[own_slots] = self._own(tempered.logsumexp(dim=1))
        if adjust is not None:
            adjust(own)
        # Before the best token is looked for: it must not be a sentinel.
        own.index_fill_(1, self._sentinel_ids, -math.inf)
        if self._retempered and temperature is not None:
            own = self._retemper(own_slots, own, temperature)
        own = self._force(own_slots, own)
        if own is not logits:
            if rows is None:
                logits.copy_(own)
            else:
                logits[rows] = own
        return broken

    def _end_broken(self, slots: Array, logprobs: torch.Tensor) -> torch.Tensor | None:
        """Force slots to their end whose log-probs are not numbers, but not those that are at their end anyway.

        One logit that is NaN or infinite, or none above -inf, makes the normaliser NaN, and with it all of the row.
        """
        finish = self.sentinels[1]
        if not self.on_host:
            broken: torch.Tensor = logprobs[:, 0].isnan() & (self._forced[slots] < 0)
            self._forced[slots] = torch.where(broken, finish, self._forced[slots])
            return broken
        nan = np.isnan(logprobs[:, 0].numpy())
        if not nan.any():
            return None
        nan &= self._forced[slots] < 0
        self._forced[slots[nan]] = finish
        return torch.from_numpy(nan)

    def _retemper(self, slots: Array, own: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scale rows whose temperature in force is not the one that the engine applies; 0 leaves only the best."""
        engine = self._tensor(self._reals[slots, Real.ENGINE_TEMPERATURE]).float()
        scaled = own * (engine / target.clamp(min=1e-5)).unsqueeze(1)
        own = torch.where((target != engine).unsqueeze(1), scaled, own)
        best = torch.zeros_like(own, dtype=torch.bool).scatter_(1, own.argmax(dim=1, keepdim=True), True)
        greedy = ((target == 0.0) & (engine > 0.0)).unsqueeze(1)
        return torch.where(greedy & ~best, -math.inf, own)

    def _force(self, slots: Array, own: torch.Tensor) -> torch.Tensor:
        """Leave only the sentinel to rows that are to end."""
        forced = self._forced[slots]
        is_forced = forced >= 0
        if self.on_host:
            rows = is_forced.nonzero()[0]
            if len(rows):
                own[rows] = -math.inf
                own[rows, forced[rows]] = 0.0
            return own
        only = torch.full_like(own, -math.inf).scatter_(1, forced.clamp(min=0).unsqueeze(1), 0.0)
        return torch.where(is_forced.unsqueeze(1), only, own)

    def _temperature(self, ints: Array, reals: Array) -> Array:
        """Temperature in force, float64 `[rows]`: the retry temperature while a segment is regenerated."""
        regenerated = ints[:, Int.ATTEMPT] > 0
        return self._xp.where(regenerated, reals[:, Real.RETRY_TEMPERATURE], reals[:, Real.TEMPERATURE])

    def _zeros(self, *shape: int, dtype: Any = None) -> Array:
        """Float64 if no `dtype` is given."""
        return self._xp.zeros(shape, dtype=dtype or self._xp.float64, device=self._place)

    def _array(self, values: Any, dtype: Any = None) -> Array:
        """Float64 if no `dtype` is given."""
        return self._xp.asarray(values, dtype=dtype or self._xp.float64, device=self._place)

    def _own(self, tensor: torch.Tensor) -> Array:
        """A tensor as one of the state's arrays, on the same memory."""
        return tensor.numpy() if self.on_host else tensor

    def _tensor(self, array: Array) -> torch.Tensor:
        """One of the state's arrays as a tensor, on the same memory."""
        return torch.from_numpy(array) if self.on_host else array


def _grown(array: Array, axis: int, size: int) -> Array:
    """`array` with at least `size` entries along `axis`, the new ones 0; doubles, so that growth is rare."""
    old = array.shape[axis]
    if size <= old:
        return array
    shape = list(array.shape)
    shape[axis] = max(size, 2 * old) - old
    if isinstance(array, np.ndarray):
        return np.concatenate([array, np.zeros(shape, array.dtype)], axis)
    return torch.cat([array, array.new_zeros(shape)], axis)
