"""Weights on their way into a running engine: what it then holds, what its tokens are labelled, and failed syncs."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.config import EngineConfig, ErasurePolicy, FixedSegmentation, ModelConfig
from common.config.run import SyncConfig
from common.trajectory import ResponseRequest, Trajectory
from common.weights import DiskUpdate, NonFiniteLogits, weights_checksum
from learner.weights.publisher import Parameters
from learner.weights.transports import publisher
from rollout_server.engine import engine as engine_module
from rollout_server.engine.engine import ErasableEngine
from rollout_server.engine.errors import EngineClosed, WeightSyncError
from tests.engines import ReferenceModel, RunningEngine, SilentListener, group_requests, running_engine
from tests.models import tiny_llama, tiny_qwen3
from tests.weights import parameters_of

FAMILIES = {
    "qwen3-tied": lambda path, seed: tiny_qwen3(path, tied=True, seed=seed),
    "llama-untied": lambda path, seed: tiny_llama(path, seed=seed),
}
POLICY = ErasurePolicy(segmentation=FixedSegmentation(length=8), kappa=0.0, max_erasures=2)
DEADLINE = 60.0


def update_from(checkpoint: Path, version: int, directory: Path) -> DiskUpdate:
    """What a learner would send of the weights in a Hugging Face directory; tied heads are left out."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return update_of(tensors, version, directory / f"weights-{version}.safetensors")


def update_of(tensors: dict[str, torch.Tensor], version: int, path: Path) -> DiskUpdate:
    save_file(tensors, path)
    return DiskUpdate(
        version=version,
        path=str(path),
        checksum=weights_checksum(tensors),
        bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
    )


class Synced:
    """An engine that has taken three syncs, and the directories of all weights, by version."""

    def __init__(self, engine: RunningEngine, checkpoints: list[Path]) -> None:
        self.engine = engine
        self.checkpoints = checkpoints


@pytest.fixture(scope="module", params=list(FAMILIES))
def synced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Synced]:
    directory = tmp_path_factory.mktemp("weights")
    checkpoints = [FAMILIES[request.param](directory / str(seed), seed) for seed in range(4)]
    with running_engine(checkpoints[0], max_concurrent_responses=16) as engine:
        engine.generate(requests())
        for version in (1, 2, 3):
            update = update_from(checkpoints[version], version, directory)
            assert engine.run(engine.engine.sync(update, DEADLINE)) == update.checksum
        yield Synced(engine, checkpoints)


def requests(seed: int = 0, max_tokens: int = 40) -> list:
    """The same prompts every time, so that a stale prefix cache would be used."""
    return group_requests(4, 4, max_tokens=max_tokens, prompt_tokens=70, seed=seed, policy=POLICY, ignore_eos=True)


def assert_log_probs(trajectories: list[Trajectory], reference: ReferenceModel) -> None:
    for trajectory in trajectories:
        expected = reference.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)


def test_after_three_syncs_log_probs_are_those_of_the_last_weights(synced: Synced) -> None:
    trajectories = synced.engine.generate(requests())
    assert_log_probs(trajectories, ReferenceModel(synced.checkpoints[3]))
    assert {v for t in trajectories for v in t.token_versions} == {3}


def test_after_three_syncs_an_engine_equals_one_started_from_the_checkpoint(synced: Synced) -> None:
    greedy = [r.model_copy(update={"temperature": 0.0, "erasable": False}) for r in requests(seed=1) if r.sample == 0]
    mine = synced.engine.generate(greedy)
    with running_engine(synced.checkpoints[3], max_concurrent_responses=16) as fresh:
        theirs = fresh.generate(greedy)
    for a, b in zip(mine, theirs, strict=True):
        assert a.token_ids == b.token_ids
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)


class _AfterTokens(SilentListener):
    """Sets `reached` once so many tokens were sampled."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.reached = asyncio.Event()

    def sampled(self, token_ids: list[int], logprobs: object) -> None:
        self.left -= len(token_ids)
        if self.left <= 0:
            self.reached.set()


def test_tokens_are_labelled_with_the_weights_that_sampled_them(synced: Synced, tmp_path: Path) -> None:
    engine = synced.engine
    update = update_from(synced.checkpoints[1], 7, tmp_path)
    listener = _AfterTokens(30)

    async def sync_half_way() -> list[Trajectory]:
        tasks = [
            asyncio.create_task(engine.engine.generate(r, listener if n == 0 else None))
            for n, r in enumerate(requests(seed=2, max_tokens=100))
        ]
        await asyncio.wait_for(listener.reached.wait(), DEADLINE)
        await engine.engine.sync(update, DEADLINE)
        return await asyncio.gather(*tasks)

    trajectories = engine.run(sync_half_way())
    before, after = ReferenceModel(synced.checkpoints[3]), ReferenceModel(synced.checkpoints[1])
    mixed = 0
    for trajectory in trajectories:
        versions = torch.tensor(trajectory.token_versions)
        assert len(versions) == len(trajectory.token_ids)
        assert set(versions.tolist()) <= {3, 7}
        mixed += len(set(versions.tolist())) == 2
        old = before.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        new = after.logprobs(trajectory.prompt_token_ids, trajectory.token_ids)
        expected = torch.where(versions == 7, new, old)
        torch.testing.assert_close(torch.tensor(trajectory.logprobs).double(), expected, atol=1e-4, rtol=0)
    assert mixed > 3


@pytest.mark.parametrize("failure", ["checksum", "missing file", "deadline"])
def test_a_failed_sync_serves_nothing_until_one_succeeds(synced: Synced, tmp_path: Path, failure: str) -> None:
    engine = synced.engine
    good = update_from(synced.checkpoints[2], 9, tmp_path)
    bad, deadline, message = {
        "checksum": (good.model_copy(update={"checksum": "0" * 16}), DEADLINE, "checksum"),
        "missing file": (good.model_copy(update={"path": str(tmp_path / "gone")}), DEADLINE, "gone"),
        "deadline": (good, 1e-4, "was not loaded within"),
    }[failure]
    with pytest.raises(WeightSyncError, match=message):
        engine.run(engine.engine.sync(bad, deadline))
    with pytest.raises(WeightSyncError, match="version 9"):
        engine.generate(requests()[:1])
    engine.run(engine.engine.sync(good, DEADLINE))
    assert_log_probs(engine.generate(requests()), ReferenceModel(synced.checkpoints[2]))


@pytest.mark.parametrize("given_up", [True, False], ids=["given up", "too busy to give it up"])
def test_a_sync_whose_deadline_ends_while_it_loads_is_no_hindrance_to_the_next(
    synced: Synced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    engine = synced.engine
    late, good = (update_from(synced.checkpoints[n], 10 + n, tmp_path) for n in (1, 2))
    load, call = engine.engine.llm.update_weights, engine.engine.llm.collective_rpc

    async def load_and_hang(request: Any) -> None:
        await load(request)
        await asyncio.sleep(DEADLINE)

    async def hang(method: str, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(DEADLINE)

    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.llm, "update_weights", load_and_hang)
        if not given_up:
            patch.setattr(engine_module, "ABANDON_SECONDS", 0.2)
            patch.setattr(engine.engine.llm, "collective_rpc", hang)
        with pytest.raises(WeightSyncError, match="version 11"):
            engine.run(engine.engine.sync(late, 3.0))
        with pytest.raises(WeightSyncError, match="version 11"):
            engine.generate(requests()[:1])
    assert engine.engine.llm.collective_rpc == call
    engine.run(engine.engine.sync(good, DEADLINE))
    assert_log_probs(engine.generate(requests()), ReferenceModel(synced.checkpoints[2]))


def test_a_file_that_ends_half_way_is_no_hindrance_to_the_next(synced: Synced, tmp_path: Path) -> None:
    engine = synced.engine
    good = update_from(synced.checkpoints[3], 14, tmp_path)
    tensors = load_file(good.path)
    shrunk = sorted(tensors)[-1]
    bad = update_of({**tensors, shrunk: tensors[shrunk][:1].clone()}, 14, tmp_path / "shrunk.safetensors")
    with pytest.raises(WeightSyncError):
        engine.run(engine.engine.sync(bad, DEADLINE))
    engine.run(engine.engine.sync(good, DEADLINE))
    assert_log_probs(engine.generate(requests()), ReferenceModel(synced.checkpoints[3]))


def changed(
    update: DiskUpdate, version: int, directory: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> DiskUpdate:
    """Another update, whose tensors `change` makes of those of `update`."""
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(update.path).items()}
    return update_of(tensors, version, directory / f"changed-{version}.safetensors")


def everyones(engine: RunningEngine, seed: int, **common: Any) -> list[Trajectory | NonFiniteLogits]:
    """Plain, erasable and streamed responses, all at once, and how each ended; 20 of each kind."""
    settings: dict[str, Any] = {"max_tokens": 30, "prompt_tokens": 40, "ignore_eos": True, **common}

    async def one(request: ResponseRequest, listener: SilentListener | None) -> Trajectory | NonFiniteLogits:
        try:
            return await engine.engine.generate(request, listener)
        except NonFiniteLogits as error:
            return error

    async def all_kinds() -> list[Trajectory | NonFiniteLogits]:
        work = []
        for number, (policy, listener) in enumerate(
            [(None, None), (POLICY, None), (None, SilentListener()), (POLICY, SilentListener())]
        ):
            kind = group_requests(20, 1, seed=seed + number, policy=policy, **settings)
            work += [one(request, listener) for request in kind]
        return await asyncio.gather(*work)

    return engine.run(all_kinds())


OVERFLOWING = {
    "norms": lambda name, tensor: tensor * 1e25 if "norm" in name else tensor,
    "values": lambda name, tensor: tensor * 1e38 if "v_proj" in name else tensor,
}


@pytest.mark.parametrize("kind", list(OVERFLOWING))
def test_weights_that_overflow_answer_nothing_and_leave_nothing_behind(
    synced: Synced, tmp_path: Path, kind: str
) -> None:
    engine = synced.engine
    good = update_from(synced.checkpoints[3], 20, tmp_path)
    greedy = group_requests(60, 1, max_tokens=30, prompt_tokens=40, seed=9, temperature=0.0, ignore_eos=True)
    engine.run(engine.engine.sync(good, DEADLINE))
    before = [answer.token_ids for answer in engine.generate(greedy)]
    engine.run(engine.engine.sync(changed(good, 21, tmp_path, OVERFLOWING[kind]), DEADLINE))
    followed = engine.counters()["following"]
    ends = everyones(engine, seed=30)
    broken = [end.version for end in ends if isinstance(end, NonFiniteLogits)]
    assert broken == [21] * len(broken)
    for answer in ends:
        if isinstance(answer, Trajectory):
            assert torch.tensor(answer.logprobs).isfinite().all()
    # Qwen's norms of queries and keys hold some of it off.
    assert len(broken) == len(ends) or (kind == "norms" and not broken)
    assert engine.counters()["following"] == followed
    engine.run(engine.engine.sync(good.model_copy(update={"version": 22}), DEADLINE))
    assert [answer.token_ids for answer in engine.generate(greedy)] == before
    assert_log_probs(engine.generate(requests()), ReferenceModel(synced.checkpoints[3]))


def test_one_prompts_overflow_is_nothing_to_others(synced: Synced, tmp_path: Path) -> None:
    """One token's embedding is infinite: what was not given that token must not meet what it left in KV memory."""
    engine = synced.engine
    good = update_from(synced.checkpoints[3], 30, tmp_path)
    if "lm_head.weight" not in load_file(good.path):
        pytest.skip("in a tied model the token's logit is infinite for all")
    engine.run(engine.engine.sync(good, DEADLINE))
    greedy = group_requests(60, 1, max_tokens=30, prompt_tokens=40, seed=9, temperature=0.0, ignore_eos=True)
    before = [answer.token_ids for answer in engine.generate(greedy)]
    used = {token for r, answer in zip(greedy, before, strict=True) for token in r.prompt_token_ids + answer}
    poison = min(set(range(256, 300)) - used)

    def poisoned(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name:
            tensor[poison] = torch.inf
        return tensor

    engine.run(engine.engine.sync(changed(good, 31, tmp_path, poisoned), DEADLINE))
    bad = [r.model_copy(update={"prompt_token_ids": [poison, *r.prompt_token_ids[1:]]}) for r in greedy]

    async def one(request: ResponseRequest) -> list[int] | NonFiniteLogits:
        try:
            return (await engine.engine.generate(request)).token_ids
        except NonFiniteLogits as error:
            return error

    async def mixed() -> list[list[int] | NonFiniteLogits]:
        return await asyncio.gather(*(one(r) for pair in zip(bad, greedy, strict=True) for r in pair))

    for _ in range(3):
        ends = engine.run(mixed())
        assert all(isinstance(end, NonFiniteLogits) for end in ends[::2])
        assert ends[1::2] == before
    engine.run(engine.engine.sync(good, DEADLINE))


def test_a_plain_response_may_sample_a_sentinel_on_its_own_account(synced: Synced, tmp_path: Path) -> None:
    engine = synced.engine
    sentinel = engine.engine.sentinel_ids[1]
    flat = changed(update_from(synced.checkpoints[3], 40, tmp_path), 41, tmp_path, lambda _, tensor: tensor * 1e-3)
    engine.run(engine.engine.sync(flat, DEADLINE))
    plain = group_requests(60, 1, max_tokens=60, seed=11, ignore_eos=True)
    answers = engine.generate(plain)
    assert any(sentinel in answer.token_ids[:-1] for answer in answers)
    assert all(len(answer.token_ids) == 60 for answer in answers)


async def test_a_response_that_waits_for_a_pause_to_end_is_told_of_the_engines_end(tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_llama(tmp_path / "model")), max_length=256)
    engine = await ErasableEngine.start(model, EngineConfig(max_concurrent_responses=16))
    await engine.pause()
    waiting = asyncio.create_task(engine.generate(requests()[0]))
    await asyncio.sleep(0.1)
    await engine.close()
    with pytest.raises(EngineClosed):
        await asyncio.wait_for(waiting, DEADLINE)


@pytest.mark.parametrize("transport", ["host", "disk", "gloo"])
def test_every_transport_brings_the_learners_weights_into_the_engine(
    synced: Synced, tmp_path: Path, transport: Literal["host", "disk", "gloo"]
) -> None:
    """Published as a rank publishes them; a replica that restarts may load them once more."""
    config = SyncConfig(
        transport=transport,
        directory=str(tmp_path) if transport == "disk" else None,
        bucket_bytes=2**16 if transport == "gloo" else None,
    )
    engine, sender = synced.engine, publisher(config, 1, "127.0.0.1")

    async def publish_and_sync(version: int, parameters: Parameters) -> None:
        update = sender.begin(version, parameters)
        publishing = asyncio.create_task(asyncio.to_thread(sender.publish, version, parameters))
        if not update.streams:
            update = update.model_copy(update={"checksum": (await publishing).checksum})
        held = await engine.engine.sync(update, DEADLINE)
        assert held == (await publishing).checksum
        assert await engine.engine.sync(update, DEADLINE) == held
        sender.keep_only(version)

    try:
        for version, checkpoint in ((50, 1), (51, 2)):
            model = AutoModelForCausalLM.from_pretrained(synced.checkpoints[checkpoint], dtype=torch.float32)
            parameters = parameters_of(dict(model.named_parameters()))
            engine.run(publish_and_sync(version, parameters))
            trajectories = engine.generate(requests())
            assert_log_probs(trajectories, ReferenceModel(synced.checkpoints[checkpoint]))
            assert {v for t in trajectories for v in t.token_versions} == {version}
    finally:
        sender.close()
