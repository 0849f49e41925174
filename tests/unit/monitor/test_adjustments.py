"""What the monitor applies to logits equals what vLLM's sampler does, wherever the seam between two submissions is."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.ops.bad_words import apply_bad_words
from vllm.v1.sample.ops.penalties import apply_all_penalties

from rollout_server.monitor.adjustments import Adjuster, Adjustments

VOCABULARY = 12
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)
PENALTIES = st.tuples(st.sampled_from([0.0, 0.7, -1.5]), st.sampled_from([0.0, 0.3, -2.0]), st.sampled_from([1.0, 1.3]))
WORDS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=3), max_size=4)


def of_vllm(asked: Adjustments, logits: torch.Tensor, prompt: list[int], response: list[int]) -> torch.Tensor:
    """In the order of vLLM's sampler, by its own functions where they are functions."""
    logits = logits.clone().unsqueeze(0)
    if asked.allowed_token_ids is not None:
        banned = torch.ones(VOCABULARY, dtype=torch.bool)
        banned[list(asked.allowed_token_ids)] = False
        logits.masked_fill_(banned, -math.inf)
    apply_bad_words(logits, {0: [list(word) for word in asked.bad_words]}, [response])
    if len(response) < asked.min_tokens:
        logits[0, list(asked.stops)] = -math.inf
    for token, bias in asked.logit_bias:
        logits[0, token] += bias
    return apply_all_penalties(
        logits,
        torch.tensor([prompt]),
        torch.tensor([asked.presence_penalty]),
        torch.tensor([asked.frequency_penalty]),
        torch.tensor([asked.repetition_penalty]),
        [response],
    )[0]


@settings(deadline=None)
@given(
    prompt=TOKENS.filter(bool),
    response=TOKENS,
    seam=st.integers(0, 8),
    seed=st.integers(0, 1000),
    words=WORDS,
    penalties=PENALTIES,
    min_tokens=st.integers(0, 9),
    allowed=st.none() | st.sets(st.integers(0, VOCABULARY - 1), min_size=1),
    bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.0, 5.0]), max_size=3),
)
def test_an_adjuster_does_what_vllms_sampler_does(
    prompt: list[int],
    response: list[int],
    seam: int,
    seed: int,
    words: list[list[int]],
    penalties: tuple[float, float, float],
    min_tokens: int,
    allowed: set[int] | None,
    bias: dict[int, float],
) -> None:
    asked = Adjustments(
        min_tokens,
        (0, 3),
        *penalties,
        logit_bias=tuple(bias.items()),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        bad_words=tuple(map(tuple, words)),
    )
    committed, sampled = response[:seam], response[seam:]
    running: list[int] = []
    adjuster = Adjuster(asked, prompt, committed, running, VOCABULARY, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for place in range(len(sampled) + 1):
        logits = torch.randn(VOCABULARY, generator=generator) * 3
        expected = of_vllm(asked, logits, prompt, committed + running)
        adjuster.apply(logits)
        assert torch.equal(logits, expected)
        running += sampled[place : place + 1]
