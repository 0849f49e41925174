"""Checks of sampling parameters against the served model: what the engine could not do is refused beforehand."""

from typing import Any

from common.config.erasure import ErasurePolicy
from common.trajectory import SamplingExtras
from rollout_server.http.openai.errors import bad_request
from rollout_server.http.openai.prompts import check_in_vocabulary
from rollout_server.replicas.replica import EngineFacts

MAX_SCORES = 500_000
"""Log-probs of prompts that one answer may hold: some 30 MiB of JSON."""


def check_extras(extras: SamplingExtras, policy: ErasurePolicy | None, facts: EngineFacts, tokenizer: Any) -> None:
    """400 for tokens that the model lacks, for what cannot be erased, and where no token could be sampled."""
    vocabulary = facts.vocabulary
    check_in_vocabulary(list(extras.stop_token_ids), vocabulary, "stop_token_ids")
    check_in_vocabulary(list(extras.allowed_token_ids or ()), vocabulary, "allowed_token_ids")
    check_in_vocabulary(list(extras.logit_bias), vocabulary, "logit_bias")
    if policy is not None and extras.json_schema is not None:
        raise bad_request(
            "the grammar of a response_format cannot go back to the start of a segment: set erasure.enabled to false",
            "response_format",
        )
    never = _last_tokens(extras.bad_words, tokenizer)
    if policy is not None:
        never |= set(facts.sentinel_ids)
    if extras.min_tokens:
        never |= {*facts.eos_token_ids, *extras.stop_token_ids}
    allowed = set(range(vocabulary)) if extras.allowed_token_ids is None else set(extras.allowed_token_ids)
    if never and not allowed - never:
        raise bad_request(
            "no token is left to sample: all that are allowed end the response, complete a bad word or are reserved",
            "allowed_token_ids",
        )


def _last_tokens(words: tuple[str, ...], tokenizer: Any) -> set[int]:
    """Tokens that complete one of `words`, at the beginning of a text or after a space."""
    last = set()
    for number, word in enumerate(words):
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if ids:
                last.add(ids[-1])
            elif not text.startswith(" "):
                raise bad_request(f"bad_words[{number}] has no tokens", f"bad_words[{number}]")
    return last


def check_scores(prompts: list[list[int]], choices: int, top: int) -> None:
    """400 if the log-probs of prompts would be too many."""
    scores = choices * sum(map(len, prompts)) * (top + 1)
    if scores > MAX_SCORES:
        raise bad_request(
            f"the answer would hold {scores} log-probs of prompts; at most {MAX_SCORES} are allowed: "
            "ask for fewer likeliest tokens, choices or prompts",
            "prompt_logprobs",
        )
