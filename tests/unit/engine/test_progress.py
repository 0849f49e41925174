"""How a response moves on from judged attempts, and which attempt is kept when erasures are spent."""

import itertools

import hypothesis.strategies as st
from hypothesis import given

from common.config import ErasurePolicy
from common.threshold import GroupStatistics, History, is_erased, kept_attempt
from common.trajectory import Attempt, Judgement, ResponseRequest
from rollout_server.engine.progress import Progress, version_spans

THRESHOLD = 1.0
LIMIT = 30
EOS = 9


def judged_attempt(
    policy: ErasurePolicy, progress: Progress, tokens: list[int], uncertainty: float, erased_limit: int
) -> Attempt:
    """What the monitor says of an attempt, given what the submission told it."""
    start, before, number = len(progress.committed), progress.erased_tokens, progress.attempt
    erased = is_erased(policy, uncertainty, THRESHOLD, number, before, len(tokens), erased_limit)
    if not erased and uncertainty > THRESHOLD and number:
        erased = progress.best is not None and progress.best < uncertainty
    return Attempt(
        segment=progress.segment,
        attempt=number,
        start=start,
        end=start + len(tokens),
        token_ids=tokens,
        logprobs=[-uncertainty] * len(tokens),
        behaviour_logprobs=[-uncertainty] * len(tokens),
        signal=[uncertainty] * len(tokens),
        temperature=1.0,
        versions=[],
        verdict="erased" if erased else "accepted",
        judgement=Judgement(
            uncertainty=uncertainty,
            base=uncertainty,
            extreme=0.0,
            gradient=0.0,
            baseline=THRESHOLD,
            penalty=1.0,
            modulation=1.0,
            threshold=THRESHOLD,
            statistics=GroupStatistics(2.0, 1.0, 0.25, 0.0, 0.0, 0.0),
            history=progress.history,
            erased_tokens_before=before,
        ),
    )


@st.composite
def responses(draw: st.DrawFn) -> tuple[ErasurePolicy, ResponseRequest, list[tuple[int, bool, float]]]:
    """A policy, a request and drawn attempts: length, whether it ends the response, and U."""
    policy = ErasurePolicy(
        threshold=THRESHOLD,
        max_erasures=draw(st.integers(0, 4)),
        regeneration_budget=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0, 5.0])),
        on_exhaustion=draw(st.sampled_from(["last", "best"])),
    )
    request = ResponseRequest(
        prompt_id="p", group_id="g", group_size=1, sample=0, prompt_token_ids=[1], max_tokens=LIMIT, policy=policy
    )
    lengths, ends = st.integers(1, 7), st.sampled_from([False, False, False, True])
    uncertainties = st.floats(0.5, 2.5).map(lambda u: round(u, 1))
    return policy, request, draw(st.lists(st.tuples(lengths, ends, uncertainties), min_size=1, max_size=40))


def generated(policy: ErasurePolicy, request: ResponseRequest, drawn: list[tuple[int, bool, float]]) -> list[Progress]:
    """The progress after each attempt."""
    limit = policy.erased_token_limit(LIMIT)
    states, progress, fresh = [], Progress("kind", policy, limit), itertools.count(100)
    for length, ends, uncertainty in drawn:
        length = min(length, LIMIT - len(progress.committed))
        tokens = [next(fresh) for _ in range(length)]
        if ends:
            tokens[-1] = EOS
        before = Progress("kind", policy, limit)
        before.resume(list(progress.attempts))
        assert (before, progress.attempts) == (progress, before.attempts), "resumed from what is on record"
        kept = progress.add(judged_attempt(policy, progress, tokens, uncertainty, limit))
        assert kept is None or kept.verdict == "accepted"
        copy = Progress("kind", policy, limit)
        copy.resume(list(progress.attempts))
        states.append(copy)
        if progress.is_complete(request, [EOS]):
            break
    return states


@given(responses())
def test_what_is_kept_is_the_least_uncertain_attempt_within_the_budget(
    drawn: tuple[ErasurePolicy, ResponseRequest, list[tuple[int, bool, float]]],
) -> None:
    policy, request, attempts = drawn
    limit = policy.erased_token_limit(LIMIT)
    final = generated(policy, request, attempts)[-1]
    erased = [a for a in final.attempts if a.verdict == "erased"]
    accepted = [a for a in final.attempts if a.verdict == "accepted"]
    assert final.erased_tokens == sum(len(a.token_ids) for a in erased) <= limit
    assert final.committed == [token for a in accepted for token in a.token_ids]
    assert [a.segment for a in accepted] == list(range(len(accepted)))
    history, spent, position = History(), 0, 0
    for number, members in itertools.groupby(final.attempts, key=lambda a: a.segment):
        own = list(members)
        assert [a.attempt for a in own] == list(range(len(own)))
        assert {a.start for a in own} == {position}
        kept = [a for a in own if a.verdict == "accepted"]
        assert len(kept) == (1 if number < final.segment else 0)
        verdicts, before = [], spent
        for attempt in own:
            judgement = attempt.judgement
            assert judgement is not None
            assert judgement.erased_tokens_before == before
            assert (judgement.history.uncertainty, judgement.history.mean) == (history.uncertainty, history.mean)
            verdicts.append(
                is_erased(
                    policy, judgement.uncertainty, THRESHOLD, attempt.attempt, before, len(attempt.token_ids), limit
                )
            )
            before += len(attempt.token_ids)
        # Whatever is followed by another attempt was erased by the rule; the last is accepted, or gives way.
        assert all(verdicts[:-1])
        if not kept:
            assert verdicts[-1]
            continue
        uncertainties = [judgement.uncertainty for a in own if (judgement := a.judgement)]
        expected = len(own) - 1
        if policy.on_exhaustion == "best" and uncertainties[-1] > THRESHOLD:
            total = sum(len(a.token_ids) for a in own)
            allowed = [a for a in own[:-1] if spent + total - len(a.token_ids) <= limit]
            better = [uncertainties[a.attempt] for a in allowed]
            if better and min(better) < uncertainties[-1]:
                expected = max(a.attempt for a in allowed if uncertainties[a.attempt] == min(better))
        assert kept[0].attempt == expected
        assert not verdicts[-1]
        spent += sum(len(a.token_ids) for a in own) - len(kept[0].token_ids)
        position += len(kept[0].token_ids)
        history = History(history.uncertainty + uncertainties[expected], history.mean + 1.0)


def test_of_equal_attempts_the_last_is_kept() -> None:
    assert kept_attempt([2.0, 1.5, 1.5], [4, 4, 4], 0, 100) == 2
    assert kept_attempt([1.5, 1.5, 2.0], [4, 4, 4], 0, 100) == 1


def test_an_attempt_that_is_too_short_for_the_budget_is_not_kept() -> None:
    # 20 tokens in all: keeping the first leaves 18 erased, the second 11, the last 11.
    assert kept_attempt([0.1, 0.5, 0.9], [2, 9, 9], 0, 18) == 0
    assert kept_attempt([0.1, 0.5, 0.9], [2, 9, 9], 0, 17) == 1
    assert kept_attempt([0.1, 0.5, 0.9], [2, 8, 9], 0, 10) == 2


@given(
    first=st.integers(0, 50),
    changes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=5),
    where=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_version_spans_say_of_each_token_which_weights_sampled_it(
    first: int, changes: list[tuple[int, int]], where: tuple[int, int]
) -> None:
    versions = [(first, 0), *sorted((first + position, version) for position, version in changes)]
    start, end = (first + place for place in sorted(where))
    of_position = dict[int, int]()
    for position, version in versions:
        of_position |= dict.fromkeys(range(position, end), version)
    spans = version_spans(versions, start, end)
    labels = [span.version for span in spans for _ in range(span.start, span.end)]
    assert labels == [of_position[position] for position in range(start, end)]
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])][: len(spans)]
