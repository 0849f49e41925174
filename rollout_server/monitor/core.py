"""The segment monitor's core: measures uncertainty, judges segments and says which rows to force to a sentinel.

Tensors only, on the device of the logits; nothing here knows vLLM, and no step waits for the device. Adapters give
it the rows of a batch as slots: `observe` takes the tokens that the last step sampled, `prepare` the logits from
which the next ones will be sampled. Mathematics: `algorithm.md`, sections 2 to 5; reference: `common.uncertainty`
and `common.threshold`.
"""

import math

import torch

from rollout_server.monitor.judge import judge, uncertainty_parts
from rollout_server.monitor.layout import NO_SENTINEL, Int, Judged, Real, SlotSpec, Sum


class SegmentMonitor:
    """State of all followed responses, a slot each, and the statistics of their groups.

    `sentinels`: the token ids that are forced to end a request, (erase, finish). All capacities grow on demand.
    """

    def __init__(self, vocabulary: int, device: torch.device, sentinels: tuple[int, int], slots: int = 64) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self.sentinels = sentinels
        self.selects_rows = device.type == "cpu"
        """Whether a step may look at which rows matter: free on CPU, a wait for the device elsewhere."""
        self._sentinel_ids = torch.tensor(sentinels, device=device)
        self._last_logprobs = torch.zeros(slots, vocabulary, device=device)
        self._behaviour_normaliser = torch.zeros(slots, device=device)
        self._entropy = torch.zeros(slots, device=device)
        self._ring = torch.zeros(slots, 1, dtype=torch.float64, device=device)
        self._segment_tokens = torch.zeros(slots, 1, 3, device=device)
        self._ints = torch.zeros(slots, len(Int), dtype=torch.int64, device=device)
        self._sums = torch.zeros(slots, len(Sum), dtype=torch.float64, device=device)
        self._reals = torch.zeros(slots, len(Real), dtype=torch.float64, device=device)
        self._forced = torch.full((slots,), NO_SENTINEL, dtype=torch.int64, device=device)
        self._token_tables = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
        self._groups = torch.zeros(8, 1, 3, dtype=torch.float64, device=device)
        self._priors = torch.zeros(1, 1, 3, dtype=torch.float64, device=device)
        self._fresh_sums = torch.tensor([0.0, 0.0, -math.inf, 0.0, 0.0], dtype=torch.float64, device=device)
        self._tempered: set[int] = set()
        self._retempered: set[int] = set()
        self._entropic: set[int] = set()

    @property
    def capacity(self) -> int:
        """Slots that exist."""
        return len(self._forced)

    def add_token_table(self, token_ids: torch.Tensor) -> int:
        """A table of the tokens that end a segment or a response; returns the row that names it. Row 0 is empty."""
        row = torch.zeros(1, self.vocabulary, dtype=torch.bool, device=self.device)
        row[0, token_ids.to(self.device)] = True
        self._token_tables = torch.cat([self._token_tables, row])
        return len(self._token_tables) - 1

    def open_group(self, group: int) -> None:
        """Start the statistics of a group's row afresh."""
        if group >= len(self._groups):
            self._groups = _grown(self._groups, 0, group + 1)
        self._groups[group] = 0.0

    def close_group(self, group: int, prior: int, decay: float) -> None:
        """Fold a finished group's statistics into its prior (`common.threshold.updated_prior`)."""
        count = self._groups[group, :, 0]
        weight = count.clamp(min=1.0)
        mean, second = self._groups[group, :, 1] / weight, self._groups[group, :, 2] / weight
        known, old_mean, old_second = self._priors[prior].unbind(-1)
        keep = decay * (known > 0).double()
        updated = torch.stack(
            [torch.ones_like(known), keep * old_mean + (1 - keep) * mean, keep * old_second + (1 - keep) * second],
            dim=-1,
        )
        self._priors[prior] = torch.where((count > 0).unsqueeze(-1), updated, self._priors[prior])

    def clear_prior(self, prior: int) -> None:
        """Forget what a prior's row holds, or make the row."""
        if prior >= len(self._priors):
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
            self._priors[prior, : len(values)] = torch.tensor(values, dtype=torch.float64, device=self.device)

    def open(self, slot: int, spec: SlotSpec) -> None:
        """Follow a response in `slot` from `spec.position` on; whatever the slot held is forgotten."""
        policy = spec.policy
        self._reserve(slot, spec)
        retry = policy.retry_temperature if policy.retry_temperature is not None else spec.temperature
        self._ints[slot] = torch.tensor(
            [
                spec.position, 0, spec.segment, spec.attempt, spec.erased_tokens, policy.window,
                policy.segmentation.min_length, policy.segmentation.max_length, spec.limit,
                spec.delimiters, spec.stops, spec.group, spec.prior,
                policy.max_erasures if spec.erasable else 0, spec.erased_limit,
                policy.observe == "all", policy.signal == "entropy",
            ]
        )  # fmt: skip
        history = spec.history
        self._sums[slot] = torch.tensor(
            [0.0, 0.0, -math.inf, 0.0, 0.0, history.uncertainty, history.mean, history.deviation],
            dtype=torch.float64,
        )
        self._reals[slot] = torch.tensor(
            [
                policy.weights.base, policy.weights.extreme, policy.weights.gradient,
                policy.kappa, policy.gamma, policy.eta,
                math.nan if policy.threshold is None else policy.threshold,
                policy.prior_strength, spec.temperature, retry, spec.engine_temperature,
            ],
            dtype=torch.float64,
        )  # fmt: skip
        self._ring[slot] = 0.0
        self._forced[slot] = NO_SENTINEL
        self.close(slot)
        if spec.temperature != 1.0 or retry != 1.0:
            self._tempered.add(slot)
        if retry != spec.temperature:
            self._retempered.add(slot)
        if policy.signal == "entropy":
            self._entropic.add(slot)

    def close(self, slot: int) -> None:
        """Stop following the response in `slot`."""
        for special in (self._tempered, self._retempered, self._entropic):
            special.discard(slot)

    def _reserve(self, slot: int, spec: SlotSpec) -> None:
        if slot >= self.capacity:
            slots = max(slot + 1, 2 * self.capacity)
            for name in (
                "_last_logprobs", "_behaviour_normaliser", "_entropy", "_ring",
                "_segment_tokens", "_ints", "_sums", "_reals", "_forced",
            ):  # fmt: skip
                setattr(self, name, _grown(getattr(self, name), 0, slots))
        segmentation = spec.policy.segmentation
        longest = min(segmentation.max_length, spec.limit)
        self._ring = _grown(self._ring, 1, min(spec.policy.window, longest))
        self._segment_tokens = _grown(self._segment_tokens, 1, longest)
        # One more than a response has: a finished row may be stepped once more before the engine takes it out.
        segments = -(-spec.limit // segmentation.min_length) + 1
        self._groups = _grown(self._groups, 1, segments)
        self._priors = _grown(self._priors, 1, segments)

    def observe(self, slots: torch.Tensor, tokens: torch.Tensor) -> Judged | None:
        """Take the tokens `[rows]` that were sampled from the logits last given for `slots` `[rows]`.

        Returns the judgements of the segments that ended, or None. On a GPU every row is returned, the column
        `Field.JUDGED` saying which count, so that the host need not know.
        """
        ints, sums = self._ints[slots], self._sums[slots]
        signal = self._measure(slots, tokens, ints)
        count = ints[:, Int.COUNT] + 1
        window = ints[:, Int.WINDOW].clamp(max=self._ring.shape[1])
        self._ring[slots, ints[:, Int.COUNT] % window] = signal
        average = self._ring[slots].sum(dim=1) / torch.minimum(count, window)
        step = (signal - sums[:, Sum.PREVIOUS]).abs()
        sums[:, Sum.AVERAGES] += average
        sums[:, Sum.SIGNAL] += signal
        sums[:, Sum.MAXIMUM] = torch.maximum(sums[:, Sum.MAXIMUM], signal)
        sums[:, Sum.GRADIENT] = torch.where(count > 1, torch.maximum(sums[:, Sum.GRADIENT], step), 0.0)
        sums[:, Sum.PREVIOUS] = signal
        ints[:, Int.COUNT] = count
        ints[:, Int.POSITION] += 1
        final = (ints[:, Int.POSITION] >= ints[:, Int.LIMIT]) | self._token_tables[ints[:, Int.STOPS], tokens]
        ended = (
            final
            | (count >= ints[:, Int.MAX_LENGTH])
            | ((count >= ints[:, Int.MIN_LENGTH]) & self._token_tables[ints[:, Int.DELIMITERS], tokens])
        )
        self._ints[slots] = ints
        self._sums[slots] = sums
        if self.selects_rows:
            rows = ended.nonzero().squeeze(-1)
            if len(rows) == 0:
                return None
            slots, ints, sums, final, ended = slots[rows], ints[rows], sums[rows], final[rows], ended[rows]
        return self._conclude(slots, ints, sums, final, ended)

    def _measure(self, slots: torch.Tensor, tokens: torch.Tensor, ints: torch.Tensor) -> torch.Tensor:
        """H of the sampled tokens, float64 `[rows]`; also keeps it and both log-probabilities for the record."""
        logprob = self._last_logprobs[slots, tokens]
        signal = -logprob
        if self._entropic:
            signal = torch.where(ints[:, Int.USES_ENTROPY] > 0, self._entropy[slots], signal)
        behaviour = logprob
        if self._tempered:
            temperature = _temperature(ints, self._reals[slots]).float()
            behaviour = torch.where(
                temperature > 0.0,
                (logprob / temperature.clamp(min=1e-5)) - self._behaviour_normaliser[slots],
                torch.zeros_like(logprob),
            )
        self._segment_tokens[slots, ints[:, Int.COUNT]] = torch.stack([logprob, behaviour, signal], dim=1)
        return signal.double()

    def _conclude(
        self,
        slots: torch.Tensor,
        ints: torch.Tensor,
        sums: torch.Tensor,
        final: torch.Tensor,
        ended: torch.Tensor,
    ) -> Judged:
        """Judge the segments that `ended` (all arguments are rows of the batch) and move their slots on.

        An accepted segment becomes history and the next one begins. A slot that is erased or final is forced to its
        sentinel from now on: its request ends, and what follows an erasure is a new request in a new slot.
        """
        reals = self._reals[slots]
        parts = uncertainty_parts(ints, sums, reals)
        statistics = self._observe_group(ints, reals, parts[0], ended)
        verdict = judge(ints, sums, reals, parts, statistics, ended)
        temperature = _temperature(ints, reals)
        fields = torch.cat([verdict.fields, torch.stack([temperature, final, ended], dim=1)], dim=1)
        judged = Judged(slots, fields, self._segment_tokens[slots])
        erase, finish = self.sentinels
        forced = torch.where(verdict.erased, erase, torch.where(ended & final, finish, NO_SENTINEL))
        self._forced[slots] = torch.maximum(self._forced[slots], forced)
        accepted = ended & ~verdict.erased
        sums[:, Sum.HISTORY_UNCERTAINTY :] += verdict.history * accepted.unsqueeze(1)
        sums[:, : Sum.HISTORY_UNCERTAINTY] = torch.where(
            ended.unsqueeze(1), self._fresh_sums, sums[:, : Sum.HISTORY_UNCERTAINTY]
        )
        ints[:, Int.COUNT] *= ~ended
        ints[:, Int.SEGMENT] += accepted
        ints[:, Int.ATTEMPT] *= ~accepted
        self._ints[slots] = ints
        self._sums[slots] = sums
        self._ring[slots] *= ~ended.unsqueeze(1)
        return judged

    def _observe_group(
        self, ints: torch.Tensor, reals: torch.Tensor, uncertainty: torch.Tensor, ended: torch.Tensor
    ) -> torch.Tensor:
        """Count the segments that ended in their groups; statistics after that, `[rows, 6]` as `GroupStatistics`.

        Segments that end in the same step see each other, whatever their order in the batch.
        """
        group, segment = ints[:, Int.GROUP], ints[:, Int.SEGMENT]
        observed = ended & ((ints[:, Int.ATTEMPT] == 0) | (ints[:, Int.OBSERVE_ALL] > 0))
        moments = torch.stack([torch.ones_like(uncertainty), uncertainty, uncertainty**2], dim=1)
        self._groups.index_put_((group, segment), torch.where(observed.unsqueeze(1), moments, 0.0), accumulate=True)
        n, total, squares = self._groups[group, segment].unbind(-1)
        mean = total / n.clamp(min=1.0)
        variance = (squares / n.clamp(min=1.0) - mean**2).clamp(min=0.0)
        known, prior_mean, prior_second = self._priors[ints[:, Int.PRIOR], segment].unbind(-1)
        strength = known * reals[:, Real.PRIOR_STRENGTH]
        prior_variance = (prior_second - prior_mean**2).clamp(min=0.0)
        return torch.stack([n, mean, variance, strength, prior_mean, prior_variance], dim=1)

    def prepare(self, slots: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor | None) -> None:
        """Keep what is needed of the logits and force sentinels, in place, before the engine samples.

        `logits` float32 `[batch, vocabulary]`; `slots` `[rows]` are the followed rows, `rows` where they are in the
        batch (None: they are the batch). The distribution that is measured is the model's own: before sentinels are
        masked and before temperature.
        """
        own = logits if rows is None else logits[rows]
        logprobs = own.log_softmax(dim=1)
        self._last_logprobs.index_copy_(0, slots, logprobs)
        if self._entropic:
            self._entropy[slots] = -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(dim=1)
        if self._tempered:
            temperature = _temperature(self._ints[slots], self._reals[slots]).float().clamp(min=1e-5)
            self._behaviour_normaliser[slots] = (logprobs / temperature.unsqueeze(1)).logsumexp(dim=1)
        if self._retempered:
            own = self._retemper(slots, own)
        own.index_fill_(1, self._sentinel_ids, -math.inf)
        own = self._force(slots, own)
        if own is not logits:
            if rows is None:
                logits.copy_(own)
            else:
                logits[rows] = own

    def _retemper(self, slots: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Scale rows whose temperature in force is not the one that the engine applies; 0 leaves only the best."""
        target = _temperature(self._ints[slots], self._reals[slots]).float()
        engine = self._reals[slots, Real.ENGINE_TEMPERATURE].float()
        scaled = own * (engine / target.clamp(min=1e-5)).unsqueeze(1)
        own = torch.where((target != engine).unsqueeze(1), scaled, own)
        best = torch.zeros_like(own, dtype=torch.bool).scatter_(1, own.argmax(dim=1, keepdim=True), True)
        greedy = ((target == 0.0) & (engine > 0.0)).unsqueeze(1)
        return torch.where(greedy & ~best, -math.inf, own)

    def _force(self, slots: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Leave only the sentinel to rows that are to end."""
        forced = self._forced[slots]
        is_forced = forced >= 0
        if self.selects_rows:
            rows = is_forced.nonzero().squeeze(-1)
            if len(rows):
                own.index_fill_(0, rows, -math.inf)
                own[rows, forced[rows]] = 0.0
            return own
        only = torch.full_like(own, -math.inf).scatter_(1, forced.clamp(min=0).unsqueeze(1), 0.0)
        return torch.where(is_forced.unsqueeze(1), only, own)


def _temperature(ints: torch.Tensor, reals: torch.Tensor) -> torch.Tensor:
    """Temperature in force, float64 `[rows]`: the retry temperature while a segment is regenerated."""
    regenerated = ints[:, Int.ATTEMPT] > 0
    return torch.where(regenerated, reals[:, Real.RETRY_TEMPERATURE], reals[:, Real.TEMPERATURE])


def _grown(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`tensor` with at least `size` entries along `dim`, the new ones empty; doubles, so that growth is rare."""
    old = tensor.shape[dim]
    if size <= old:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = max(size, 2 * old) - old
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
