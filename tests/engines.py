"""A real engine for tests, and the independent forward pass that its answers are compared with."""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.config import EngineConfig, ModelConfig
from common.trajectory import Attempt, ResponseRequest, Trajectory
from rollout_server.engine.engine import ErasableEngine

T = TypeVar("T")
TEST_SECONDS = 300.0


class RunningEngine:
    """An engine and the event loop that it lives in; the loop runs only inside `run`."""

    def __init__(self, model: ModelConfig, engine: EngineConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self.engine = self.run(ErasableEngine.start(model, engine))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(asyncio.wait_for(work, TEST_SECONDS))

    def generate(self, requests: Iterable[ResponseRequest]) -> list[Trajectory]:
        """All responses, generated concurrently, in the order of the requests."""

        async def together() -> list[Trajectory]:
            return await asyncio.gather(*(self.engine.generate(request) for request in requests))

        return self.run(together())

    def counters(self) -> dict[str, int]:
        return self.run(self.engine.counters())

    def close(self) -> None:
        self.run(self.engine.close())
        self._loop.close()


@contextmanager
def running_engine(path: Path, *, max_length: int = 256, **engine: Any) -> Iterator[RunningEngine]:
    """A started engine on the model directory `path`."""
    running = RunningEngine(ModelConfig(path=str(path), max_length=max_length), EngineConfig(**engine))
    try:
        yield running
    finally:
        running.close()


def group_requests(
    groups: int, size: int, *, max_tokens: int, prompt_tokens: int = 20, seed: int = 0, **common: Any
) -> list[ResponseRequest]:
    """`groups` groups of `size` responses to prompts of random bytes; `common` goes to every request."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for group in range(groups):
        prompt = torch.randint(0, 256, (prompt_tokens + group % 5,), generator=generator).tolist()
        requests += [
            ResponseRequest(
                prompt_id=f"p{group}",
                group_id=f"{seed}-{group}",
                group_size=size,
                sample=sample,
                seed=seed * 1_000_000 + group * 1000 + sample,
                prompt_token_ids=prompt,
                max_tokens=max_tokens,
                **common,
            )
            for sample in range(size)
        ]
    return requests


class SilentListener:
    """A listener that ignores what it is told; tests override what they watch."""

    wants_tokens = True

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        return

    def resumed(self, cached_tokens: int) -> None:
        return

    def judged(self, attempt: Attempt, final: bool) -> None:
        return

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        return


class ReferenceModel:
    """A transformers forward pass in float32: the next-token logits after any tokens."""

    def __init__(self, path: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, prompt: list[int], response: list[int]) -> torch.Tensor:
        """Logits from which each response token was to be sampled, float64 `[response, vocabulary]`."""
        logits = self.model(torch.tensor([prompt + response])).logits[0].double()
        return logits[len(prompt) - 1 : -1]

    def logprobs(self, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
        """Log-probability of each response token, float64 `[response]`."""
        scaled = torch.log_softmax(self.logits(prompt, response) / temperature, dim=-1)
        return scaled.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)
