"""The erasable engine against plain vLLM on the same model, requests and seeds: throughput and lost steps."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.config import EngineConfig, ErasurePolicy, FixedSegmentation, ModelConfig
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.engine import ErasableEngine
from tests.benchmarks.report import Finding
from tests.benchmarks.workload import CONCURRENT, Workload, benchmark_model

T = TypeVar("T")


MAX_LENGTH = 1024
PAIRS = 5
ERASED_SHARE = 0.2
SHORT = Workload(requests=160, response=192, segment=64)
LONG = Workload(requests=96, response=600, segment=256)


async def measure_engine(directory: Path) -> list[Finding]:
    """Monitor overhead, throughput with a fifth of the segments erased, and engine steps lost per erasure."""
    path = benchmark_model(directory / "model")
    erasable = await ErasableEngine.start(
        ModelConfig(path=str(path), max_length=MAX_LENGTH), EngineConfig(max_concurrent_responses=CONCURRENT)
    )
    plain = await asyncio.to_thread(_plain_engine, path)
    try:

        async def monitored(work: Workload, policy: ErasurePolicy) -> list[Trajectory]:
            return await _continuous(work, lambda n: erasable.generate(_request(n, work, policy)))

        async def monitored_tokens(work: Workload, policy: ErasurePolicy) -> int:
            return sum(trajectory.generated_tokens for trajectory in await monitored(work, policy))

        async def plain_tokens(work: Workload, logprobs: int | None = None) -> int:
            return sum(await _continuous(work, lambda n: _plain(plain, n, work, logprobs)))

        watching = _watching(SHORT)
        findings = [
            await _ratio(
                "monitor on, nothing erased / plain vLLM",
                0.97,
                lambda: monitored_tokens(SHORT, watching),
                lambda: plain_tokens(SHORT),
                str(SHORT),
            ),
            await _ratio(
                "monitor on with log-probs / plain vLLM with logprobs=0",
                0.95,
                lambda: monitored_tokens(SHORT, watching),
                lambda: plain_tokens(SHORT, logprobs=0),
                str(SHORT),
            ),
        ]
        for work in (SHORT, LONG):
            policy = _erasing(work, await monitored(work, _watching(work)))
            before = await erasable.counters()
            finding = await _ratio(
                f"20% of segments of {work.segment} tokens erased / plain vLLM, generated tokens per second",
                0.93,
                lambda work=work, policy=policy: monitored_tokens(work, policy),
                lambda work=work: plain_tokens(work),
                str(work),
            )
            after = await erasable.counters()
            erasures = after["erasures"] - before["erasures"]
            lost = (after["lost_steps"] - before["lost_steps"]) / erasures
            detail = f"mean over {erasures} erasures of {work.segment} tokens; 1 of them is the forced sentinel"
            findings += [finding, Finding("engine steps lost per erasure", lost, 3.0, detail, at_least=False)]
        return findings
    finally:
        await erasable.close()
        await asyncio.to_thread(plain.shutdown)


def _watching(work: Workload) -> ErasurePolicy:
    return ErasurePolicy(segmentation=FixedSegmentation(length=work.segment), max_erasures=0)


def _erasing(work: Workload, watched: list[Trajectory]) -> ErasurePolicy:
    """A fixed threshold that as many first attempts exceed as are to be erased."""
    values = sorted(a.judgement.uncertainty for t in watched for a in t.attempts if a.judgement)
    threshold = values[int((1.0 - ERASED_SHARE) * len(values))]
    changes = {"threshold": threshold, "max_erasures": 1000, "regeneration_budget": 100.0}
    return _watching(work).model_copy(update=changes)


async def _ratio(
    name: str, target: float, ours: Callable[[], Awaitable[int]], theirs: Callable[[], Awaitable[int]], workload: str
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
    return Finding(name, ratio, target, f"{ours_speed:.0f} / {theirs_speed:.0f} tokens/s, pairs {spread}; {workload}")


async def _tokens_per_second(work: Callable[[], Awaitable[int]]) -> float:
    started = time.perf_counter()
    tokens = await work()
    return tokens / (time.perf_counter() - started)


async def _continuous(work: Workload, one: Callable[[int], Awaitable[T]]) -> list[T]:
    """`one` of each request, `CONCURRENT` at a time: another starts whenever one ends."""
    places = asyncio.Semaphore(CONCURRENT)

    async def placed(number: int) -> T:
        async with places:
            return await one(number)

    return await asyncio.gather(*(placed(number) for number in range(work.requests)))


def _request(number: int, work: Workload, policy: ErasurePolicy) -> ResponseRequest:
    return ResponseRequest(
        prompt_id=str(number),
        group_id=str(number),
        group_size=1,
        sample=0,
        seed=number,
        prompt_token_ids=work.prompt(number),
        max_tokens=work.limit(number),
        policy=policy,
        ignore_eos=True,
    )


_plain_ids = itertools.count()


async def _plain(llm: AsyncLLM, number: int, work: Workload, logprobs: int | None) -> int:
    params = SamplingParams(
        seed=number,
        max_tokens=work.limit(number),
        ignore_eos=True,
        detokenize=False,
        logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tokens = 0
    prompt = TokensPrompt(prompt_token_ids=work.prompt(number))
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
