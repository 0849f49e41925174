"""The erasable engine against plain vLLM on the same model, requests and seeds: throughput and lost steps."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import torch
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.config import EngineConfig, ErasurePolicy, FixedSegmentation, ModelConfig
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.engine import ErasableEngine
from tests.benchmarks.report import Finding
from tests.models import tiny_qwen3

T = TypeVar("T")

CONCURRENT = 64
REQUESTS = 96
RESPONSE_TOKENS = 192
SEGMENT_TOKENS = 64
MAX_LENGTH = 512
PAIRS = 5
ERASED_SHARE = 0.2

WORKLOAD = f"{REQUESTS} responses of {RESPONSE_TOKENS} tokens in segments of {SEGMENT_TOKENS}, {CONCURRENT} at once"


async def measure_engine(directory: Path) -> list[Finding]:
    """Monitor overhead, throughput with a fifth of the segments erased, and engine steps lost per erasure."""
    path = tiny_qwen3(directory / "model", hidden_size=384, layers=8, vocab_size=8192)
    erasable = await ErasableEngine.start(
        ModelConfig(path=str(path), max_length=MAX_LENGTH), EngineConfig(max_concurrent_responses=CONCURRENT)
    )
    plain = await asyncio.to_thread(_plain_engine, path)
    try:
        watching = ErasurePolicy(segmentation=FixedSegmentation(length=SEGMENT_TOKENS), max_erasures=0)
        trajectories: list[Trajectory] = []

        async def monitored(policy: ErasurePolicy) -> int:
            trajectories[:] = await _continuous(lambda n: erasable.generate(_request(n, policy)))
            return sum(t.generated_tokens for t in trajectories)

        async def unmonitored(logprobs: int | None) -> int:
            return sum(await _continuous(lambda n: _plain(plain, n, logprobs)))

        findings = [
            await _ratio(
                "monitor on, nothing erased / plain vLLM", 0.97, lambda: monitored(watching), lambda: unmonitored(None)
            ),
            await _ratio(
                "monitor on with log-probs / plain vLLM with logprobs=0",
                0.95,
                lambda: monitored(watching),
                lambda: unmonitored(0),
            ),
        ]
        erasing = watching.model_copy(update={"max_erasures": 1000, "regeneration_budget": 100.0, "gamma": 0.0})
        erasing = erasing.model_copy(update={"threshold": _quantile(trajectories, 1.0 - ERASED_SHARE)})
        before = await erasable.counters()
        finding = await _ratio(
            "20% of segments erased / plain vLLM, generated tokens per second",
            0.93,
            lambda: monitored(erasing),
            lambda: unmonitored(None),
        )
        after = await erasable.counters()
        erasures = after["erasures"] - before["erasures"]
        lost = (after["lost_steps"] - before["lost_steps"]) / erasures
        attempts = sum(len(t.attempts) for t in trajectories)
        share = sum(t.erasures for t in trajectories) / attempts
        detail = f"mean over {erasures} erasures, {share:.1%} of attempts erased; 1 of them is the forced sentinel"
        return [*findings, finding, Finding("engine steps lost per erasure", lost, 3.0, detail, at_least=False)]
    finally:
        await erasable.close()
        await asyncio.to_thread(plain.shutdown)


async def _ratio(
    name: str, target: float, ours: Callable[[], Awaitable[int]], theirs: Callable[[], Awaitable[int]]
) -> Finding:
    """Tokens per second of `ours` over `theirs`, the median over pairs that run one after the other."""
    await ours()
    await theirs()
    pairs = []
    for number in range(PAIRS):
        # Which goes first changes, so that a drift of the machine's speed favours neither.
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        speeds = {work: await _tokens_per_second(work) for work in order}
        pairs.append((speeds[ours], speeds[theirs]))
    ratios = [a / b for a, b in pairs]
    ratio = statistics.median(ratios)
    ours_speed, theirs_speed = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return Finding(name, ratio, target, f"{ours_speed:.0f} / {theirs_speed:.0f} tokens/s, pairs {spread}; {WORKLOAD}")


async def _tokens_per_second(work: Callable[[], Awaitable[int]]) -> float:
    started = time.perf_counter()
    tokens = await work()
    return tokens / (time.perf_counter() - started)


async def _continuous(one: Callable[[int], Awaitable[T]]) -> list[T]:
    """`one` of each request, `CONCURRENT` at a time: another starts whenever one ends."""
    places = asyncio.Semaphore(CONCURRENT)

    async def placed(number: int) -> T:
        async with places:
            return await one(number)

    return await asyncio.gather(*(placed(number) for number in range(REQUESTS)))


def _prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (24 + number % 16,), generator=generator).tolist()


def _request(number: int, policy: ErasurePolicy) -> ResponseRequest:
    # Lengths differ, so that segments of different responses do not end in the same step.
    return ResponseRequest(
        prompt_id=str(number),
        group_id=str(number),
        group_size=1,
        sample=0,
        seed=number,
        prompt_token_ids=_prompt(number),
        max_tokens=RESPONSE_TOKENS - number % 13,
        policy=policy,
        ignore_eos=True,
    )


_plain_ids = itertools.count()


async def _plain(llm: AsyncLLM, number: int, logprobs: int | None) -> int:
    params = SamplingParams(
        seed=number,
        max_tokens=RESPONSE_TOKENS - number % 13,
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tokens = 0
    prompt = TokensPrompt(prompt_token_ids=_prompt(number))
    async for output in llm.generate(prompt, params, f"plain-{next(_plain_ids)}"):
        tokens = len(output.outputs[0].token_ids)
    return tokens


def _plain_engine(path: Path) -> AsyncLLM:
    """vLLM as a user would start it for this model: no logits processor, its own scheduling policy."""
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(path),
            dtype="float32",
            max_model_len=MAX_LENGTH,
            max_num_seqs=CONCURRENT,
            block_size=32,
            enforce_eager=True,
            disable_log_stats=True,
        )
    )


def _quantile(trajectories: list[Trajectory], share: float) -> float:
    """The uncertainty below which `share` of the segments are."""
    values = sorted(a.judgement.uncertainty for t in trajectories for a in t.attempts if a.judgement)
    return values[int(share * len(values))]
