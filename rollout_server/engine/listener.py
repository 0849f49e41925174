"""Who is told of a response while it is generated, and of what."""

from typing import Protocol

from common.trajectory import Attempt

TopLogprobs = list[dict[int, float]]
"""For each sampled token: the model's log-probs of that token, first, and of the most likely ones."""

PromptScores = list[dict[int, tuple[float, int]] | None]
"""Of each token of a prompt: log-prob and rank of it, first, and of the likeliest ones; None for the first token."""


class Listener(Protocol):
    """Told of a response while it is generated. Calls come in order and must return at once."""

    @property
    def wants_tokens(self) -> bool:
        """Whether `sampled` is to be called, which costs something for every token."""
        ...

    def sampled(self, token_ids: list[int], logprobs: TopLogprobs | None) -> None:
        """Tokens that were sampled; some may be erased later. `logprobs`: where the request asks for them."""
        ...

    def resumed(self, cached_tokens: int) -> None:
        """Generation goes on after an erasure, or from where a request resumes.

        `cached_tokens` of what precedes came from the prefix cache.
        """
        ...

    def judged(self, attempt: Attempt, final: bool) -> None:
        """A segment was accepted or erased. `final`: it was accepted and ends the response."""
        ...

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        """A segment's erasures are spent: `attempt`, its last, was erased, and `kept` is accepted after all.

        `kept` was told of before, as erased. `final`: it ends the response.
        """
        ...
