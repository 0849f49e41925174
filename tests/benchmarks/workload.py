"""What the engine's and the endpoint's benchmarks run: the model, and requests that differ in length.

If all responses were equally long, those of plain vLLM would begin and end together, in batches that are full from
the first step to the last. Real requests do not, and none of ours do once one of them is erased.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.models import tiny_qwen3

CONCURRENT = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """`requests` of responses of `response` tokens on average, in segments of `segment`, `CONCURRENT` at once."""

    requests: int
    response: int
    segment: int

    def __str__(self) -> str:
        lengths = f"{self._shortest} to {3 * self._shortest - 1} tokens in segments of {self.segment}"
        return f"{self.requests} responses of {lengths}, {CONCURRENT} at once"

    @property
    def _shortest(self) -> int:
        return self.response // 2

    @property
    def tokens(self) -> int:
        """Of all responses together."""
        return sum(map(self.limit, range(self.requests)))

    def limit(self, number: int) -> int:
        """Tokens of a response."""
        return self._shortest + number * 37 % self.response

    @staticmethod
    def prompt(number: int) -> list[int]:
        """24 to 39 token ids."""
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (24 + number % 16,), generator=generator).tolist()


def benchmark_model(directory: Path) -> Path:
    """11M parameters: 64 responses at once take some 12 ms a step on two cores."""
    return tiny_qwen3(directory, hidden_size=384, layers=8, vocab_size=8192)
