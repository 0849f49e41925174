"""The segment monitor against the reference mathematics, on made-up logits and without vLLM."""

import math
from typing import Any

import pytest
import torch

from common.config import DelimiterSegmentation, ErasurePolicy, FixedSegmentation, SignalWeights
from common.threshold import GroupStatistics, History, adaptive_threshold, is_erased, shrunk_moments, updated_prior
from common.uncertainty import segment_uncertainty, token_signal
from rollout_server.monitor import Field, Judged, SegmentMonitor, SlotSpec

VOCABULARY = 50
SENTINELS = (48, 49)
CPU = torch.device("cpu")
TOKEN_BYTES = [b"x" if token == 7 else b"%d," % token for token in range(48)]
"""What the tokens add to a text; those of the sentinels have none."""


def spec(policy: ErasurePolicy, **changes: Any) -> SlotSpec:
    """A fresh response in group 0."""
    values: dict[str, Any] = {
        "policy": policy,
        "position": 0,
        "segment": 0,
        "attempt": 0,
        "erased_tokens": 0,
        "limit": 40,
        "erased_limit": 40,
        "temperature": 1.0,
        "engine_temperature": 1.0,
        "erasable": True,
        "history": History(),
        "stops": 0,
        "group": 0,
        "prior": 0,
    } | changes
    return SlotSpec(**values)


def monitor_for(policy: ErasurePolicy, slots: int, *, on_host: bool = True, **changes: Any) -> SegmentMonitor:
    """A monitor that follows `slots` responses of one group."""
    monitor = SegmentMonitor(VOCABULARY, CPU, SENTINELS, TOKEN_BYTES, slots=2, on_host=on_host)
    monitor.clear_prior(0)
    monitor.open_group(0)
    for slot in range(slots):
        monitor.open(slot, spec(policy, **changes))
    return monitor


def feed(monitor: SegmentMonitor, logits: torch.Tensor, tokens: torch.Tensor) -> list[tuple[int, Judged]]:
    """Run `tokens` `[steps, slots]`, sampled from `logits` `[steps, slots, vocabulary]`; what was judged, by step."""
    slots = torch.arange(tokens.shape[1])
    judged = []
    for step in range(len(tokens)):
        monitor.prepare(slots, logits[step].clone(), None)
        result = monitor.observe(slots, tokens[step])
        if result is not None:
            judged.append((step, result))
    return judged


def rows(judged: Judged) -> list[tuple[int, list[float]]]:
    """Slot and fields of each row that was judged."""
    pairs = zip(judged.slots.tolist(), judged.fields.tolist(), strict=True)
    return [(slot, fields) for slot, fields in pairs if fields[Field.JUDGED]]


def rows_of(judged: Judged | None) -> list[tuple[int, list[float]]]:
    """As `rows`, of what `observe` returned."""
    return [] if judged is None else rows(judged)


@pytest.fixture
def stream() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and sampled tokens of 24 steps of 6 responses."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(24, 6, VOCABULARY, generator=generator)
    logits[:, :, list(SENTINELS)] = -20.0
    probabilities = logits.softmax(-1).view(-1, VOCABULARY)
    tokens = torch.multinomial(probabilities, 1, generator=generator).view(24, 6)
    return logits, tokens


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
@pytest.mark.parametrize(
    "policy",
    [
        ErasurePolicy(segmentation=FixedSegmentation(length=6), kappa=1.0, eta=0.4, window=4),
        ErasurePolicy(
            segmentation=FixedSegmentation(length=5),
            signal="entropy",
            kappa=1.0,
            eta=0.9,
            window=2,
            weights=SignalWeights(base=0.3, extreme=1.1, gradient=0.6),
        ),
    ],
    ids=["cross-entropy", "entropy"],
)
def test_judgements_equal_the_reference(
    policy: ErasurePolicy, on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    monitor = monitor_for(policy, 6, on_host=on_host, limit=24, erasable=False)
    length = policy.segmentation.max_length
    histories = [History() for _ in range(6)]
    judged_segments = 0
    for step, judged in feed(monitor, logits, tokens):
        found = rows(judged)
        if not found:
            continue
        start = (step // length) * length
        expected = {
            slot: segment_uncertainty(
                token_signal(logits[start : step + 1, slot], tokens[start : step + 1, slot], policy.signal),
                policy.window,
                policy.weights,
            )
            for slot, _ in found
        }
        values = torch.tensor([e.uncertainty for e in expected.values()], dtype=torch.float64)
        mean, variance = float(values.mean()), float(values.var(correction=0))
        statistics = GroupStatistics(6.0, mean, variance, 0.0, 0.0, 0.0)
        for slot, fields in found:
            assert (fields[Field.START], fields[Field.END]) == (start, step + 1)
            assert fields[Field.UNCERTAINTY] == pytest.approx(expected[slot].uncertainty, abs=1e-5)
            assert fields[Field.BASE] == pytest.approx(expected[slot].base, abs=1e-5)
            assert fields[Field.EXTREME] == pytest.approx(expected[slot].extreme, abs=1e-5)
            assert fields[Field.GRADIENT] == pytest.approx(expected[slot].gradient, abs=1e-5)
            threshold = adaptive_threshold(policy, statistics, histories[slot], 0)
            assert fields[Field.THRESHOLD] == pytest.approx(threshold.threshold, abs=1e-4)
            moments = shrunk_moments(statistics)
            past = histories[slot]
            histories[slot] = History(
                past.uncertainty + expected[slot].uncertainty, past.mean + moments[0], past.deviation + moments[1]
            )
            judged_segments += 1
    assert judged_segments == 6 * math.ceil(24 / length)


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_per_token_values_are_those_of_the_sampled_tokens(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), kappa=1.0)
    monitor = monitor_for(policy, 6, on_host=on_host, limit=24, erasable=False, temperature=0.7, engine_temperature=0.7)
    own = torch.log_softmax(logits.double(), -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    behaviour = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    seen = 0
    for _, judged in feed(monitor, logits, tokens):
        for row, (slot, fields) in enumerate(zip(judged.slots.tolist(), judged.fields.tolist(), strict=True)):
            if not fields[Field.JUDGED]:
                continue
            span = slice(int(fields[Field.START]), int(fields[Field.END]))
            values = judged.tokens[row, :6].double()
            torch.testing.assert_close(values[:, 0], own[span, slot], atol=1e-5, rtol=0)
            torch.testing.assert_close(values[:, 1], behaviour[span, slot], atol=1e-5, rtol=0)
            torch.testing.assert_close(values[:, 2], -own[span, slot], atol=1e-5, rtol=0)
            seen += 1
    assert seen == 24


def test_statistics_are_shrunk_to_the_prior_of_earlier_groups(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), kappa=0.5, threshold=None, prior_decay=0.7)
    monitor = monitor_for(policy, 6, limit=24, erasable=False)
    prior: tuple[float, float] | None = None
    for group in range(3):
        shift = logits * (1.0 + 0.3 * group)
        monitor.open_group(0)
        for slot in range(6):
            monitor.open(slot, spec(policy, limit=24, erasable=False))
        (_, first), *_ = feed(monitor, shift, tokens)
        fields = rows(first)[0][1]
        known = torch.tensor([f[Field.UNCERTAINTY] for _, f in rows(first)], dtype=torch.float64)
        assert fields[Field.PRIOR_STRENGTH] == (0.0 if prior is None else policy.prior_strength)
        if prior is not None:
            assert fields[Field.PRIOR_MEAN] == pytest.approx(prior[0], abs=1e-9)
            assert fields[Field.PRIOR_VARIANCE] == pytest.approx(prior[1], abs=1e-9)
        monitor.close_group(0, 0, policy.prior_decay)
        prior = updated_prior(prior, (float(known.mean()), float(known.var(correction=0))), policy.prior_decay)


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_an_erased_segment_forces_the_erase_sentinel_and_the_end_the_other(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), threshold=0.0, max_erasures=1)
    monitor = monitor_for(policy, 1, on_host=on_host, limit=6)
    slot = torch.tensor([0])
    for attempt, sentinel in ((0, SENTINELS[0]), (1, SENTINELS[1])):
        monitor.open(0, spec(policy, limit=6, attempt=attempt, erased_tokens=6 * attempt))
        feed(monitor, logits[:6, :1], tokens[:6, :1])
        after = logits[6, :1].clone()
        monitor.prepare(slot, after, None)
        assert after.argmax().item() == sentinel
        assert after.isfinite().sum() == 1
        # The sentinel stays forced: a row in the middle of a prefill samples nothing yet.
        again = logits[7, :1].clone()
        monitor.prepare(slot, again, None)
        assert again.argmax().item() == sentinel


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_steps_after_the_forced_one_are_not_measured(on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tokens = stream
    monitor = monitor_for(ErasurePolicy(segmentation=FixedSegmentation(length=1)), 1, on_host=on_host, limit=1)
    (step, judged), *later = feed(monitor, logits[:4, :1], tokens[:4, :1])
    assert (step, [slot for slot, _ in rows(judged)]) == (0, [0])
    assert [row for _, after in later for row in rows(after)] == []


BROKEN_LOGITS = {
    "one NaN": lambda row: row.index_fill_(0, torch.tensor([17]), math.nan),
    "one infinity": lambda row: row.index_fill_(0, torch.tensor([VOCABULARY - 3]), math.inf),
    "all NaN": lambda row: row.fill_(math.nan),
    "nothing above -inf": lambda row: row.fill_(-math.inf),
}


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
@pytest.mark.parametrize("kind", list(BROKEN_LOGITS))
def test_logits_that_are_not_finite_end_a_response_and_nothing_is_learnt_of_it(
    on_host: bool, kind: str, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    monitor = monitor_for(ErasurePolicy(segmentation=FixedSegmentation(length=6)), 2, on_host=on_host, limit=12)
    slots = torch.arange(2)
    reported, judged = [], []
    for step in range(12):
        now = logits[step, :2].clone()
        if step == 3:
            BROKEN_LOGITS[kind](now[0])
        broken = monitor.prepare(slots, now, None)
        reported.append([] if broken is None else broken.tolist())
        if step >= 3:
            assert now[0].isfinite().nonzero().flatten().tolist() == [SENTINELS[1]]
        judged += rows_of(monitor.observe(slots, tokens[step, :2]))
    assert [row for row in reported if any(row)] == [[True, False]], "it is said once, and of the first only"
    assert reported.index([True, False]) == 3
    assert [slot for slot, _ in judged] == [1, 1]
    assert [fields[Field.COUNT] for _, fields in judged] == [1.0, 1.0]
    monitor.close_group(0, 0, 0.9)
    assert all(math.isfinite(value) for row in monitor.prior(0) for value in row)


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_a_response_that_has_ended_is_not_broken_by_what_follows(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    monitor = monitor_for(ErasurePolicy(segmentation=FixedSegmentation(length=1)), 1, on_host=on_host, limit=1)
    feed(monitor, logits[:1, :1], tokens[:1, :1])
    broken = monitor.prepare(torch.arange(1), torch.full((1, VOCABULARY), math.nan), None)
    assert broken is None or not broken.any()


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_masked_tokens_and_huge_logits_are_no_error(on_host: bool) -> None:
    monitor = monitor_for(ErasurePolicy(segmentation=FixedSegmentation(length=6)), 2, on_host=on_host)
    logits = torch.full((2, VOCABULARY), -math.inf)
    logits[0, 5] = 1.0
    logits[1] = torch.linspace(-1e38, 1e38, VOCABULARY)
    broken = monitor.prepare(torch.arange(2), logits, None)
    assert broken is None or not broken.any()


def test_sentinels_are_masked_in_followed_rows_only(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, _ = stream
    monitor = monitor_for(ErasurePolicy(), 2)
    batch = logits[0, :4].clone()
    monitor.prepare(torch.tensor([0, 1]), batch, torch.tensor([3, 1]))
    ordinary = [v for v in range(VOCABULARY) if v not in SENTINELS]
    torch.testing.assert_close(batch[:, ordinary], logits[0, :4, ordinary])
    assert (batch[[1, 3]][:, list(SENTINELS)] == -math.inf).all()
    torch.testing.assert_close(batch[[0, 2]], logits[0, [0, 2]])


def test_delimiters_end_segments_between_their_bounds() -> None:
    policy = ErasurePolicy(
        segmentation=DelimiterSegmentation(delimiter="x", min_length=3, max_length=5), threshold=math.inf
    )
    monitor = monitor_for(policy, 1)
    tokens = torch.tensor([[7, 1, 7, 1, 1, 1, 1, 1, 1, 1, 1, 7, 7]]).T
    spans = [
        (int(fields[Field.START]), int(fields[Field.END]))
        for _, judged in feed(monitor, torch.zeros(13, 1, VOCABULARY), tokens)
        for _, fields in rows(judged)
    ]
    # min_length keeps the first delimiter from ending a segment, max_length ends two, then a delimiter after four.
    assert spans == [(0, 3), (3, 8), (8, 12)]


def test_a_stop_token_or_the_limit_ends_the_response() -> None:
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=100), threshold=math.inf)
    monitor = monitor_for(policy, 2)
    stops = monitor.add_token_table(torch.tensor([9]))
    for slot in (0, 1):
        monitor.open(slot, spec(policy, limit=4, stops=stops))
    tokens = torch.tensor([[1, 1], [9, 1]])
    (step, stopped), *more = feed(monitor, torch.zeros(2, 2, VOCABULARY), tokens)
    assert (step, stopped.slots.tolist(), more) == (1, [0], [])
    slot = torch.tensor([1])
    for judged_expected in (False, True):
        monitor.prepare(slot, torch.zeros(1, VOCABULARY), None)
        judged = monitor.observe(slot, torch.tensor([1]))
        assert (judged is not None) == judged_expected
    assert judged.fields[0, Field.FINAL] == 1.0
    assert judged.fields[0, Field.END] == 4


def test_capacity_grows_without_losing_state(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), kappa=1.0)
    grown, steady = monitor_for(policy, 6, limit=24, erasable=False), monitor_for(policy, 6, limit=24, erasable=False)
    half = [feed(m, logits[:3], tokens[:3]) for m in (grown, steady)]
    assert half == [[], []]
    longer = policy.model_copy(update={"segmentation": FixedSegmentation(length=30), "window": 40})
    grown.open_group(20)
    grown.open(100, spec(longer, limit=400, group=20))
    judged = [feed(m, logits[3:6], tokens[3:6])[0][1].fields for m in (grown, steady)]
    torch.testing.assert_close(judged[0], judged[1], rtol=0, atol=0)


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_the_verdict_equals_the_reference_at_every_limit(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    # Attempts after the first count in the statistics here, so that there is a threshold for them.
    policy = ErasurePolicy(
        segmentation=FixedSegmentation(length=6), kappa=0.0, gamma=0.05, max_erasures=2, observe="all"
    )
    erased: dict[tuple[int, int], int] = {}
    for attempt in range(4):
        for erased_tokens in (0, 6, 12):
            changes = {"attempt": attempt, "erased_tokens": erased_tokens, "erased_limit": 16}
            monitor = monitor_for(policy, 6, on_host=on_host, limit=24, **changes)
            *_, (_, judged) = feed(monitor, logits[:6], tokens[:6])
            for _, fields in rows(judged):
                statistics = GroupStatistics(*fields[Field.COUNT : Field.PRIOR_VARIANCE + 1])
                threshold = adaptive_threshold(policy, statistics, History(), attempt).threshold
                expected = is_erased(policy, fields[Field.UNCERTAINTY], threshold, attempt, erased_tokens, 6, 16)
                assert bool(fields[Field.ERASED]) == expected
                erased[attempt, erased_tokens] = erased.get((attempt, erased_tokens), 0) + expected
    assert all(0 < erased[attempt, tokens] < 6 for attempt in (0, 1) for tokens in (0, 6)), erased
    assert not any(erased[attempt, 12] for attempt in range(4)), "the budget"
    assert not any(erased[attempt, tokens] for attempt in (2, 3) for tokens in (0, 6)), "max_erasures"


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
@pytest.mark.parametrize("threshold", [None, 0.5], ids=["adaptive", "fixed"])
def test_nothing_below_the_floor_is_erased(
    on_host: bool, threshold: float | None, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream

    def judged_with(floor: float) -> dict[int, list[float]]:
        policy = ErasurePolicy(
            segmentation=FixedSegmentation(length=6), kappa=-0.5, threshold=threshold, min_uncertainty=floor
        )
        monitor = monitor_for(policy, 6, on_host=on_host, limit=24)
        return dict(rows(feed(monitor, logits[:6], tokens[:6])[-1][1]))

    free = judged_with(0.0)
    erased = sorted(fields[Field.UNCERTAINTY] for fields in free.values() if fields[Field.ERASED])
    assert len(erased) > 2
    floor = erased[1]
    for slot, fields in judged_with(floor).items():
        assert bool(fields[Field.ERASED]) == (bool(free[slot][Field.ERASED]) and fields[Field.UNCERTAINTY] >= floor)
        policy = ErasurePolicy(kappa=-0.5, threshold=threshold, min_uncertainty=floor)
        expected = is_erased(policy, fields[Field.UNCERTAINTY], fields[Field.THRESHOLD], 0, 0, 6, 40)
        assert bool(fields[Field.ERASED]) == expected
    assert sum(bool(fields[Field.ERASED]) for fields in judged_with(floor).values()) == len(erased) - 1


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
@pytest.mark.parametrize("exhausted_by", ["erasures", "budget"])
def test_an_attempt_over_the_threshold_gives_way_to_a_better_one_when_erasures_are_spent(
    on_host: bool, exhausted_by: str, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    spent = {"attempt": 2} if exhausted_by == "erasures" else {"attempt": 1, "erased_tokens": 12, "erased_limit": 16}
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), threshold=2.0, max_erasures=2)

    def judged_with(**changes: Any) -> dict[int, tuple[float, bool]]:
        monitor = monitor_for(policy, 6, on_host=on_host, limit=6, **changes)
        found = rows(feed(monitor, logits[:6], tokens[:6])[-1][1])
        after = logits[6].clone()
        monitor.prepare(torch.arange(6), after, None)
        assert after.argmax(1).tolist() == [SENTINELS[0] if f[Field.ERASED] else SENTINELS[1] for _, f in found]
        return {slot: (fields[Field.UNCERTAINTY], bool(fields[Field.ERASED])) for slot, fields in found}

    alone = judged_with(**spent)
    assert not any(erased for _, erased in alone.values())
    over = sorted(u for u, _ in alone.values() if u > 2.0)
    assert 2 <= len(over) < 6
    best = over[len(over) // 2]
    erased = judged_with(**spent, best=best)
    assert {slot: erased for slot, (_, erased) in erased.items()} == {
        slot: u > 2.0 and best < u for slot, (u, _) in alone.items()
    }
    assert any(e for _, e in erased.values())
    # The first attempt at a segment has nothing to give way to, whatever the slot was told of the one before.
    none = judged_with(attempt=0, erased_tokens=16, erased_limit=16, best=0.0)
    assert not any(e for _, e in none.values())


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_statistics_of_the_group_are_over_all_of_its_segments(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=4), statistics="group", prior_decay=0.7)
    monitor = monitor_for(policy, 6, on_host=on_host, limit=24, erasable=False)
    prior: tuple[float, float] | None = None
    for group in range(2):
        observed: list[float] = []
        monitor.open_group(0)
        for slot in range(6):
            monitor.open(slot, spec(policy, limit=24, erasable=False))
        judged = feed(monitor, logits * (1.0 + 0.5 * group), tokens)
        for _, result in judged:
            observed += [fields[Field.UNCERTAINTY] for _, fields in rows(result)]
            values = torch.tensor(observed, dtype=torch.float64)
            for _, fields in rows(result):
                assert fields[Field.COUNT] == len(observed)
                assert fields[Field.MEAN] == pytest.approx(float(values.mean()), abs=1e-9)
                assert fields[Field.VARIANCE] == pytest.approx(float(values.var(correction=0)), abs=1e-9)
                assert fields[Field.PRIOR_MEAN] == pytest.approx(prior[0] if prior else 0.0, abs=1e-9)
        assert len(observed) == 36
        monitor.close_group(0, 0, policy.prior_decay)
        prior = updated_prior(prior, (float(values.mean()), float(values.var(correction=0))), policy.prior_decay)
    assert len(monitor.prior(0)) == 1


@pytest.mark.parametrize("on_host", [True, False], ids=["cpu", "gpu-path"])
def test_a_response_that_leaves_the_batch_is_measured_as_if_it_had_stayed(
    on_host: bool, stream: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, tokens = stream
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), window=3, threshold=math.inf)
    steady, disturbed = (monitor_for(policy, 3, on_host=on_host, limit=24) for _ in range(2))
    expected = {
        slot: fields for _, judged in feed(steady, logits[:6, :3], tokens[:6, :3]) for slot, fields in rows(judged)
    }
    assert sorted(expected) == [0, 1, 2]
    everyone, others = torch.arange(3), torch.tensor([2, 0])
    for step in range(3):
        disturbed.prepare(everyone, logits[step, :3].clone(), None)
        if step < 2:
            assert not rows_of(disturbed.observe(everyone, tokens[step, :3]))
    # The token of step 2 is sampled for all, but the middle one is preempted before it is observed.
    disturbed.leave(1)
    assert not rows_of(disturbed.observe(others, tokens[2, others]))
    found = {}
    for step in range(3, 6):
        disturbed.prepare(others, logits[step, others].clone(), None)
        found |= dict(rows_of(disturbed.observe(others, tokens[step, others])))
    # It is back, as the last of the batch, and its token is observed together with those of the others.
    disturbed.enter(1)
    alone = torch.tensor([1])
    assert not rows_of(disturbed.observe(alone, tokens[2, alone]))
    for step in range(3, 6):
        batch = logits[step, :3].clone()
        disturbed.prepare(alone, batch, alone)
        found |= dict(rows_of(disturbed.observe(alone, tokens[step, alone])))
    parts = slice(Field.START, Field.GRADIENT + 1)
    assert {slot: fields[parts] for slot, fields in found.items()} == {
        slot: fields[parts] for slot, fields in expected.items()
    }


def test_greedy_regeneration_takes_the_best_token_that_is_no_sentinel(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits = stream[0][0, :1].clone()
    logits[0, SENTINELS[0]] = 100.0
    best = logits[0, : SENTINELS[0]].argmax()
    policy = ErasurePolicy(retry_temperature=0.8)
    monitor = monitor_for(policy, 1, temperature=0.0, engine_temperature=0.8)
    # After an accepted retry the request still runs at the retry temperature, but is to be greedy again.
    monitor.prepare(torch.tensor([0]), logits, None)
    assert logits.argmax() == best
    assert logits.isfinite().sum() == 1
