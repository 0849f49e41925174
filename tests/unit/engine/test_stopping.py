"""Stop strings in training: where a response ends, whatever its tokens and segments."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ConfigError
from common.config.erasure import ErasurePolicy
from common.stops import text_before_stop
from common.trajectory import Attempt, ResponseRequest, Trajectory
from learner.environments.data import PromptStream
from learner.evaluation.evaluate import evaluation_requests
from learner.loop.ledger import Ledger
from learner.loop.treatment import training_requests
from rollout_server.engine.stopping import cut_attempts, generate_until_stop
from tests.configs import run_config
from tests.models import byte_tokenizer
from tests.trajectories import attempt_of, random_groups

TOKENIZER = byte_tokenizer(256)
EOS = 256
Segment = tuple[list[list[int]], int]
"""All attempts at a segment, and which of them stays."""


class Engine:
    """Brings attempts as the engine does, an event-loop turn after each; ends early only if it is cancelled."""

    eos_token_ids = (EOS,)
    version = 7

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.told = 0
        self.cancelled = False

    async def generate(self, request: ResponseRequest, listener: Any = None) -> Trajectory:
        try:
            return await self._generate(request, listener)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def _generate(self, request: ResponseRequest, listener: Any) -> Trajectory:
        attempts: list[Attempt] = []
        start = 0
        for number, (own, kept) in enumerate(self.segments):
            final = number + 1 == len(self.segments)
            if request.policy is None:
                listener.sampled(own[kept], None)
                attempts.append(attempt_of(own[kept], segment=number, start=start))
            else:
                attempts += self._attempts(own, kept, number, start, final, listener)
            self.told += 1
            start += len(own[kept])
            await asyncio.sleep(0)
        if request.policy is None:
            attempts = [attempt_of([t for a in attempts for t in a.token_ids], segment=0, start=0)]
        return trajectory(request, attempts)

    def _attempts(
        self, own: list[list[int]], kept: int, number: int, start: int, final: bool, listener: Any
    ) -> list[Attempt]:
        made = [
            attempt_of(tokens, segment=number, number=n, start=start, verdict="erased", uncertainty=0.5)
            for n, tokens in enumerate(own)
        ]
        stays = made[kept].model_copy(update={"verdict": "accepted"})
        for attempt in made[:-1]:
            listener.judged(attempt, False)
        if kept == len(own) - 1:
            listener.judged(stays, final)
        else:
            listener.restored(made[-1], stays, final)
        made[kept] = stays
        return made


def trajectory(request: ResponseRequest, attempts: list[Attempt]) -> Trajectory:
    return Trajectory(
        prompt_id=request.prompt_id,
        group_id=request.group_id,
        sample=0,
        seed=0,
        prompt_token_ids=request.prompt_token_ids,
        attempts=attempts,
        erasable=request.erasable,
        finish_reason="length",
        policy=request.policy,
    )


def request(stops: tuple[str, ...], policy: ErasurePolicy | None) -> ResponseRequest:
    return ResponseRequest(
        prompt_id="p",
        group_id="g",
        group_size=1,
        sample=0,
        prompt_token_ids=TOKENIZER.encode("p: "),
        max_tokens=64,
        stop=stops,
        policy=policy,
    )


def first_stop(tokens: list[int], stops: tuple[str, ...]) -> int | None:
    """How many tokens it takes until a stop string stands in their text."""
    for count in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:count], skip_special_tokens=True)
        if any(stop in text for stop in stops):
            return count
    return None


TEXT = st.text(alphabet="abé\n", max_size=6)
ATTEMPTS = st.lists(TEXT.map(TOKENIZER.encode).filter(bool), min_size=1, max_size=3)
SEGMENTS = st.lists(
    ATTEMPTS.flatmap(lambda own: st.tuples(st.just(own), st.integers(0, len(own) - 1))), min_size=1, max_size=6
)
STOPS = st.lists(st.text(alphabet="abé\n", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(segments=SEGMENTS, stops=STOPS, monitored=st.booleans())
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    segments: list[Segment], stops: tuple[str, ...], monitored: bool
) -> None:
    tokens = [token for own, kept in segments for token in own[kept]]
    engine = Engine(segments)
    asked = request(stops, ErasurePolicy() if monitored else None)
    found = asyncio.run(generate_until_stop(engine, TOKENIZER.backend_tokenizer, asked))
    count = first_stop(tokens, stops)
    assert found.token_ids == (tokens if count is None else tokens[:count])
    assert found.finish_reason == ("length" if count is None else "stop")
    assert len(found.token_versions) == len(found.token_ids)
    text = TOKENIZER.decode(found.token_ids, skip_special_tokens=True)
    cut = text_before_stop(text, stops)
    assert not any(stop in cut for stop in stops)
    if count is not None:
        assert any(text == cut + stop or text.startswith(cut + stop) for stop in stops)
        # Nothing is generated on and on after it.
        ends = [sum(len(own[kept]) for own, kept in segments[: n + 1]) for n in range(len(segments))]
        needed = next(n for n, end in enumerate(ends) if end >= count)
        assert engine.told == needed + 1
    if monitored:
        assert len(found.behaviour_logprobs) == len(found.token_ids)
        for attempt in found.attempts:
            assert attempt.end - attempt.start == len(attempt.token_ids) == len(attempt.signal)
        segments_seen = {attempt.segment for attempt in found.attempts}
        assert segments_seen == set(range(len(found.accepted)))
        erased = sum(len(own) - 1 for own, _ in segments[: len(found.accepted)])
        assert found.erasures == erased


def test_an_erased_stop_string_ends_nothing() -> None:
    engine = Engine([([TOKENIZER.encode("a stop"), TOKENIZER.encode("bc")], 1), ([TOKENIZER.encode("d")], 0)])
    asked = request(("stop",), ErasurePolicy())
    found = asyncio.run(generate_until_stop(engine, TOKENIZER.backend_tokenizer, asked))
    assert TOKENIZER.decode(found.token_ids) == "bcd"
    assert not engine.cancelled


def test_the_text_of_the_end_of_sequence_completes_no_stop_string() -> None:
    engine = Engine([([[*TOKENIZER.encode("ab"), EOS]], 0)])
    asked = request(("b<", "end"), ErasurePolicy())
    found = asyncio.run(generate_until_stop(engine, TOKENIZER.backend_tokenizer, asked))
    assert found.token_ids[-1] == EOS
    assert found.finish_reason == "length"


def test_whoever_waits_may_leave_and_takes_the_generation_along() -> None:
    async def leave() -> None:
        engine = Engine([([TOKENIZER.encode("x")], 0)] * 1000)
        asked = request(("stop",), ErasurePolicy())
        waiting = asyncio.create_task(generate_until_stop(engine, TOKENIZER.backend_tokenizer, asked))
        await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert engine.cancelled

    asyncio.run(leave())


def test_cutting_keeps_the_versions_of_what_stays() -> None:
    versions = [{"start": 0, "end": 3, "version": 1}, {"start": 3, "end": 6, "version": 2}]
    one = Attempt.model_validate(attempt_of([1] * 6, segment=0, start=0).model_dump() | {"versions": versions})
    other = attempt_of([2] * 4, segment=1, start=6)
    (cut,) = cut_attempts([one, other], 2)
    assert [(s.start, s.end, s.version) for s in cut.versions] == [(0, 2, 1)]
    (cut,) = cut_attempts([one, other], 5)
    assert [(s.start, s.end, s.version) for s in cut.versions] == [(0, 3, 1), (3, 5, 2)]
    assert cut_attempts([one, other], 6) == [one]
    assert cut_attempts([one, other], 10) == [one, other]


def test_of_stop_strings_the_one_that_is_complete_first_ends_the_text() -> None:
    assert text_before_stop("one two three", ("three", "two")) == "one "
    assert text_before_stop("abcd", ("abcd", "bc")) == "a"
    assert text_before_stop("abcd", ("cd", "bcd")) == "ab"
    assert text_before_stop("abcd", ("x",)) == "abcd"


def test_training_and_evaluation_ask_for_the_same_stop_strings() -> None:
    settings = run_config(rollout={"stop": ["</answer>", "\n\n"]})
    prompt = random_groups(0, 1, 1)[0].prompt
    draw = Ledger(PromptStream([prompt, prompt], 0, 2), 2).draw(0)
    asked = [*training_requests(settings, draw, True)]
    for mode in ("plain", "erasable"):
        asked += evaluation_requests(settings, [prompt], mode)[0]
    assert {one.stop for one in asked} == {("</answer>", "\n\n")}
    with pytest.raises(ConfigError, match=r"rollout\.stop\.0"):
        run_config(rollout={"stop": [""]})
