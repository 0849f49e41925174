"""Packed responses: nothing of a trajectory is lost, arrays are small, and they travel without being copied."""

import math
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ErasurePolicy
from common.packed import Group, PackedResponse, lossless_floats, pack, unpack
from common.threshold import GroupStatistics, History
from common.trajectory import Attempt, Judgement, Prompt, Trajectory, VersionSpan
from tests.trajectories import PROMPT_TOKENS, attempt, attempt_of, random_trajectory, trajectory

FLOATS = st.floats(allow_nan=False)
SINGLES = st.floats(allow_nan=False, width=32)
TOKENS = st.integers(0, 2**31 - 1)
COUNTS = st.integers(0, 2**31 - 1)
JUDGEMENTS = st.builds(
    Judgement,
    uncertainty=FLOATS,
    base=FLOATS,
    extreme=FLOATS,
    gradient=FLOATS,
    baseline=st.none() | FLOATS,
    penalty=FLOATS,
    modulation=FLOATS,
    threshold=st.none() | FLOATS,
    statistics=st.builds(GroupStatistics, *[FLOATS] * 6),
    history=st.builds(History, *[FLOATS] * 3),
    erased_tokens_before=COUNTS,
)


@st.composite
def attempts(draw: st.DrawFn) -> Attempt:
    length = draw(st.integers(0, 12))
    start = draw(st.integers(0, 10_000))

    def column() -> list[float]:
        # What an engine measures is float32; hand-made values may be anything; without a monitor there are none.
        values = draw(st.sampled_from([SINGLES, FLOATS, None]))
        return [] if values is None else draw(st.lists(values, min_size=length, max_size=length))

    return Attempt(
        segment=draw(st.integers(0, 3000)),
        attempt=draw(st.integers(0, 9)),
        start=start,
        end=start + length,
        token_ids=draw(st.lists(TOKENS, min_size=length, max_size=length)),
        logprobs=column(),
        behaviour_logprobs=column(),
        signal=column(),
        temperature=draw(st.floats(0.0, 2.0)),
        versions=draw(st.lists(st.builds(VersionSpan, start=COUNTS, end=COUNTS, version=COUNTS), max_size=3)),
        verdict=draw(st.sampled_from(["accepted", "erased"])),
        judgement=draw(st.none() | JUDGEMENTS),
    )


TRAJECTORIES = st.builds(
    Trajectory,
    prompt_id=st.text(),
    group_id=st.text(),
    sample=COUNTS,
    seed=st.integers(0, 2**64),
    prompt_token_ids=st.lists(TOKENS, max_size=5),
    attempts=st.lists(attempts(), max_size=5),
    erasable=st.booleans(),
    finish_reason=st.sampled_from(["stop", "length"]),
    policy=st.sampled_from([None, ErasurePolicy(), ErasurePolicy(max_erasures=2)]),
    erased_token_limit=COUNTS,
    reused_prefix_tokens=COUNTS,
    text=st.text(),
    reward=st.none() | FLOATS,
)


def travelled(packed: PackedResponse) -> PackedResponse:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    received: PackedResponse = pickle.loads(data, buffers=buffers)
    return received


@settings(max_examples=60, deadline=None)
@given(response=TRAJECTORIES)
def test_packing_loses_nothing_and_the_header_counts_as_the_trajectory_does(response: Trajectory) -> None:
    packed = travelled(pack(response))
    assert unpack(packed) == response
    assert packed.generated_tokens == response.generated_tokens
    assert packed.erased_tokens == response.erased_tokens
    assert packed.erasures == response.erasures
    assert packed.response_tokens == len(response.token_ids)
    assert packed.prompt_tokens == len(response.prompt_token_ids)
    assert packed.token_ids.tolist() == response.token_ids
    behaviour = [value for a in response.attempts for value in a.behaviour_logprobs]
    assert packed.behaviour_tokens == len(behaviour)
    if versions := [span.version for a in response.accepted for span in a.versions]:
        assert packed.oldest_version == min(versions)


def is_single(value: float) -> bool:
    try:
        return bool(struct.unpack("f", struct.pack("f", value))[0] == value)
    except OverflowError:
        return False


@given(values=st.lists(st.floats() | SINGLES, max_size=20))
def test_floats_are_halved_only_where_every_bit_of_them_survives(values: list[float]) -> None:
    stored = lossless_floats(values)
    assert [math.isnan(v) for v in stored.tolist()] == [math.isnan(v) for v in values]
    finite = [v for v in values if not math.isnan(v)]
    assert [v for v in stored.tolist() if not math.isnan(v)] == finite
    assert (stored.dtype == np.float32) == all(map(is_single, finite))


def test_what_an_engine_measures_takes_sixteen_bytes_a_token_and_leaves_the_pickle_out_of_band() -> None:
    rng = np.random.default_rng(0)
    length = 8192
    measured = rng.uniform(-6.0, 0.0, length).astype(np.float32).tolist()
    tokens = rng.integers(0, 150_000, length).tolist()
    packed = pack(trajectory([attempt_of(tokens, segment=0, start=0, logprobs=measured)], reward=1.0))
    assert packed.arrays.nbytes == 16 * length + 4 * len(PROMPT_TOKENS)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 4096
    received: PackedResponse = pickle.loads(data, buffers=buffers)
    assert np.shares_memory(received.arrays.token_ids, packed.arrays.token_ids)


def test_a_response_that_was_not_monitored_has_no_values_and_beside_others_they_are_not_numbers() -> None:
    plain = attempt_of([1, 2, 3], segment=0, start=0).model_copy(
        update={"logprobs": [], "behaviour_logprobs": [], "signal": []}
    )
    alone = pack(trajectory([plain], reward=None))
    assert alone.arrays.behaviour_logprobs.size == 0
    assert (alone.behaviour_tokens, alone.behaviour_logprob_sum) == (0, 0.0)
    both = pack(trajectory([plain, attempt_of([4], segment=1, start=3, logprobs=[-0.5])], reward=None))
    assert np.isnan(both.arrays.behaviour_logprobs).tolist() == [True, True, True, False]
    assert (both.behaviour_tokens, both.behaviour_logprob_sum) == (1, -0.5)


@pytest.mark.parametrize("name", ["token_ids", "logprobs", "behaviour_logprobs", "signal"])
def test_lists_that_do_not_fit_their_attempt_are_refused_with_both_lengths(name: str) -> None:
    whole = attempt(np.random.default_rng(0), 2, 7, 4)
    short = whole.model_copy(update={name: getattr(whole, name)[:3]})
    with pytest.raises(ValueError, match=rf"segment 2 is of tokens 7 to 11, but has 3 {name}$"):
        pack(trajectory([short], reward=None))


def test_without_its_tokens_a_header_says_where_they_are() -> None:
    packed = pack(random_trajectory(np.random.default_rng(0), sample=3, reward=1.0))
    packed.tokens, packed.reference = None, "the store"
    calls: list[Any] = [lambda: packed.token_ids, lambda: unpack(packed)]
    for call in calls:
        with pytest.raises(RuntimeError, match="response 3 to prompt 'p0' are elsewhere, at the store"):
            call()


def test_a_group_holds_responses_to_its_own_prompt_only() -> None:
    packed = pack(random_trajectory(np.random.default_rng(0), sample=0, reward=1.0, prompt_id="other"))
    prompt = Prompt(id="p0", text="", token_ids=[1])
    with pytest.raises(ValueError, match=r"group of prompt 'p0' holds responses to \['other'\]"):
        Group(prompt, [packed])
    with pytest.raises(ValueError, match="holds no response"):
        Group(prompt, [])
