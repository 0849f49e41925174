"""What a monitored response is sampled with beside temperature and truncation: penalties, biases, masks.

vLLM's own would count only a request's tokens, but a response is several requests once something is erased; they would
come before the monitor has measured the model's own distribution, and could mask a sentinel. So the monitor's adapter
applies them: after the measurement, before sentinels. Mathematics and order are those of vLLM's sampler.
"""

import math

import msgspec
import torch


class Adjustments(msgspec.Struct, frozen=True):
    """For one response. `stops` may not be sampled before `min_tokens`; `bad_words` are token sequences."""

    min_tokens: int = 0
    stops: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()


class Adjuster:
    """Applies `Adjustments` to the logits of one submission.

    `prompt`: of the response. `committed`: the response's tokens before the submission. `sampled`: those of the
    submission, a running list that others extend.
    """

    def __init__(
        self,
        adjustments: Adjustments,
        prompt: list[int],
        committed: list[int],
        sampled: list[int],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._adjustments = adjustments
        self._committed = committed
        self.sampled = sampled
        self._counted = 0
        self._stops = torch.tensor(adjustments.stops, dtype=torch.int64, device=device)
        self._banned: torch.Tensor | None = None
        if adjustments.allowed_token_ids is not None:
            self._banned = torch.ones(vocabulary, dtype=torch.bool, device=device)
            self._banned[torch.tensor(adjustments.allowed_token_ids, device=device)] = False
        ids, biases = zip(*adjustments.logit_bias, strict=True) if adjustments.logit_bias else ((), ())
        self._biased = torch.tensor(ids, dtype=torch.int64, device=device)
        self._biases = torch.tensor(biases, dtype=torch.float32, device=device)
        self._counts: torch.Tensor | None = None
        if adjustments.presence_penalty or adjustments.frequency_penalty or adjustments.repetition_penalty != 1.0:
            self._counts = torch.bincount(torch.tensor(committed, dtype=torch.int64), minlength=vocabulary).to(device)
            self._in_prompt = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(prompt, dtype=torch.int64, device=device)] = True

    def apply(self, logits: torch.Tensor) -> None:
        """Change `logits`, float32 `[vocabulary]`, from which the next token will be sampled."""
        asked = self._adjustments
        if self._banned is not None:
            logits.masked_fill_(self._banned, -math.inf)
        for word in asked.bad_words:
            if self._ends_with(word[:-1]):
                logits[word[-1]] = -math.inf
        if len(self._committed) + len(self.sampled) < asked.min_tokens:
            logits.index_fill_(0, self._stops, -math.inf)
        if asked.logit_bias:
            logits.index_add_(0, self._biased, self._biases)
        if self._counts is not None:
            self._penalise(logits, self._counts)

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        """Whether the response so far does."""
        if not tokens:
            return True
        last = self.sampled[-len(tokens) :]
        missing = len(tokens) - len(last)
        if missing:
            last = self._committed[-missing:] + last
        return tuple(last) == tokens

    def _penalise(self, logits: torch.Tensor, counts: torch.Tensor) -> None:
        for token in self.sampled[self._counted :]:
            counts[token] += 1
        self._counted = len(self.sampled)
        asked = self._adjustments
        seen = counts > 0
        if asked.repetition_penalty != 1.0:
            penalty = torch.where(seen | self._in_prompt, asked.repetition_penalty, 1.0)
            logits.mul_(torch.where(logits > 0, 1.0 / penalty, penalty))
        if asked.frequency_penalty:
            logits.sub_(asked.frequency_penalty * counts)
        if asked.presence_penalty:
            logits.sub_(asked.presence_penalty * seen)
