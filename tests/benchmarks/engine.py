"""The erasable engine against plain vLLM on the same model, requests and seeds: throughput and lost steps."""

import asyncio
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from common.config import EngineConfig, ErasurePolicy, FixedSegmentation, ModelConfig
from common.trajectory import ResponseRequest, Trajectory
from rollout_server.engine.engine import ErasableEngine
from tests.benchmarks.report import Finding
from tests.benchmarks.workload import CONCURRENT, Workload, benchmark_model

T = TypeVar("T")


MAX_LENGTH = 1024
ROUNDS = 3
TURN_SECONDS = 1.0
ERASED_SHARE = 0.2
SHORT = Workload(requests=160, response=192, segment=64)
LONG = Workload(requests=96, response=600, segment=256)


@dataclass(frozen=True, slots=True)
class _Side:
    """An engine and what it is to do: `load` returns how many tokens it generated."""

    llm: AsyncLLM
    load: Callable[[], Awaitable[int]]


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

        def ours(work: Workload, policy: ErasurePolicy) -> _Side:
            async def load() -> int:
                return sum(trajectory.generated_tokens for trajectory in await monitored(work, policy))

            return _Side(erasable.llm, load)

        def theirs(work: Workload, logprobs: int | None = None) -> _Side:
            async def load() -> int:
                return sum(await _continuous(work, lambda n: _plain(plain, n, work, logprobs)))

            return _Side(plain, load)

        watching = ours(SHORT, _watching(SHORT))
        findings = [
            await _ratio("monitor on, nothing erased / plain vLLM", 0.97, watching, theirs(SHORT), str(SHORT)),
            await _ratio(
                "monitor on with log-probs / plain vLLM with logprobs=0",
                0.95,
                watching,
                theirs(SHORT, logprobs=0),
                str(SHORT),
            ),
        ]
        for work in (SHORT, LONG):
            policy = _erasing(work, await monitored(work, _watching(work)))
            before = await erasable.counters()
            finding = await _ratio(
                f"20% of segments of {work.segment} tokens erased / plain vLLM, generated tokens per second",
                0.93,
                ours(work, policy),
                theirs(work),
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


async def _ratio(name: str, target: float, ours: _Side, theirs: _Side, workload: str) -> Finding:
    """Tokens per second of `ours` over `theirs`: the median over rounds in which they take turns."""
    await ours.load()
    await theirs.load()
    rounds = []
    for number in range(ROUNDS):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        speeds = await _in_turns(order)
        rounds.append((speeds[order.index(ours)], speeds[order.index(theirs)]))
    ratios = [a / b for a, b in rounds]
    ours_speed, theirs_speed = (statistics.median(side) for side in zip(*rounds, strict=True))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    detail = f"{ours_speed:.0f} / {theirs_speed:.0f} tokens/s, rounds {spread}; {workload}"
    return Finding(name, statistics.median(ratios), target, detail)


async def _in_turns(sides: tuple[_Side, _Side]) -> list[float]:
    """Tokens per second of each side under its whole load, while the other is frozen.

    Turns are short, so that a machine whose speed drifts is the same for both. What an engine does of a step after
    its turn is over is not counted, which takes the same share of both.
    """
    for side in sides:
        await side.llm.pause_generation(mode="keep", clear_cache=False)
    loads = [asyncio.create_task(side.load()) for side in sides]
    seconds = [0.0 for _ in sides]
    while not all(load.done() for load in loads):
        for place, (side, load) in enumerate(zip(sides, loads, strict=True)):
            if load.done():
                continue
            await side.llm.resume_generation()
            started = time.perf_counter()
            await asyncio.wait((load,), timeout=TURN_SECONDS)
            seconds[place] += time.perf_counter() - started
            await side.llm.pause_generation(mode="keep", clear_cache=False)
    for side in sides:
        await side.llm.resume_generation()
    return [load.result() / taken for load, taken in zip(loads, seconds, strict=True)]


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
