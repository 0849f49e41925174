"""A rollout side and a learner without vLLM, Ray or DeepSpeed: the driver's loop in milliseconds, and deterministic."""

import asyncio
import hashlib
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common import metrics as names
from common.config.run import RunConfig
from common.packed import Group, PackedResponse, unpack
from common.seeds import attempt_seed
from common.trajectory import Attempt, ResponseRequest, Trajectory, Verdict
from common.weights import DiskUpdate, ReplicaSync, SyncReport, WeightUpdate
from learner.environments.tasks import chain
from rollout_server.replicas.packing import packed
from tests.models import byte_tokenizer
from tests.trajectories import attempt_of

TOKENIZER = byte_tokenizer(1024)
Hook = Callable[[int], None]
"""Called with the number of the call; may raise, or send a signal."""


class FakeRollouts:
    """Solves each step of a chain with a chance that grows with the weight version; erases what is wrong, once.

    `on_generate` is called at the beginning of every `generate`.
    """

    def __init__(self, on_generate: Hook = lambda call: None, hang: bool = False) -> None:
        self.on_generate = on_generate
        self.hang = hang
        self.pause_seconds = 0.0
        self.version = 0
        self.calls = 0
        self.requests: list[list[ResponseRequest]] = []
        self.learnt = 0.0
        self.events: list[str] = []

    async def start(self, config: RunConfig, log_directory: Path) -> None:
        self.events.append("start")

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        self.calls += 1
        call = self.calls
        await asyncio.sleep(self.pause_seconds)
        self.on_generate(call)
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.events.append("cancelled")
        self.requests.extend(list(group) for group in groups)
        answers = [self._respond(request) for group in groups for request in group]
        # Answers come in any order.
        random.Random(call).shuffle(answers)
        for answer in answers:
            await asyncio.sleep(0)
            yield answer
        # Plain responses teach the thresholds nothing.
        if monitored := [answer.generated_tokens for answer in answers if answer.policy is not None]:
            self.learnt = self.learnt / 2 + sum(monitored)

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> SyncReport:
        self.version = update.version
        replica = ReplicaSync(replica=0, version=update.version, checksum=update.checksum, seconds=0.0)
        return SyncReport(version=update.version, seconds=0.0, bytes=update.bytes, replicas=[replica])

    async def state(self) -> list[Any]:
        return [{"learnt": self.learnt}]

    async def restore(self, state: list[Any]) -> None:
        if state:
            self.learnt = state[0]["learnt"]

    def take_counts(self) -> dict[str, int]:
        return {names.REPLICA_RESTARTS: 0, names.RESUBMISSIONS: 0}

    async def close(self) -> None:
        self.events.append("close")

    def _respond(self, request: ResponseRequest) -> PackedResponse:
        prompt = TOKENIZER.decode(request.prompt_token_ids)
        problem = chain.parse_prompt(prompt)
        attempts: list[Attempt] = []
        assert request.seed is not None
        for segment, right in enumerate(problem.solution.splitlines(keepends=True)):
            start = attempts[-1].end if attempts else 0
            wrong = right[:-2] + str((int(right[-2]) + 1) % 10) + "\n"
            for number in range(2):
                chance = random.Random(attempt_seed(request.seed, segment, number) + self.version).random()
                slips = chance > 0.75 + 0.02 * self.version
                erased = slips and number == 0 and request.erasable
                line, verdict = (wrong if slips else right), ("erased" if erased else "accepted")
                attempts.append(self._attempt(request, segment, number, start, line, verdict))
                if not erased:
                    break
        trajectory = Trajectory(
            prompt_id=request.prompt_id,
            group_id=request.group_id,
            sample=request.sample,
            seed=request.seed,
            prompt_token_ids=request.prompt_token_ids,
            attempts=attempts,
            erasable=request.erasable,
            finish_reason="stop",
            policy=request.policy,
        )
        return packed(trajectory, request, TOKENIZER)

    def _attempt(
        self, request: ResponseRequest, segment: int, number: int, start: int, line: str, verdict: Verdict
    ) -> Attempt:
        return attempt_of(
            TOKENIZER.encode(line),
            segment=segment,
            number=number,
            start=start,
            verdict=verdict,
            temperature=request.temperature,
            version=self.version,
            uncertainty=0.5 if request.policy else None,
        )


class FakeLearner:
    """Its one weight is a hash of everything it was trained on, so that two runs that differ anywhere show it."""

    def __init__(self, on_train: Hook = lambda step: None) -> None:
        self.on_train = on_train
        self.weight = "0"
        self.events: list[str] = []
        self.exported: list[WeightUpdate] = []
        self.released: list[WeightUpdate] = []

    async def start(self) -> None:
        self.events.append("start")

    async def restart(self) -> None:
        self.events.append("restart")
        self.weight = "0"

    async def train_step(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        self.on_train(step)
        text = self.weight + "".join(unpack(t).model_dump_json() for group in groups for t in group.trajectories)
        self.weight = hashlib.sha256(text.encode()).hexdigest()
        return {names.LOSS: int(self.weight[:8], 16) / 2**32, names.LEARNER_TOKENS: 10.0}

    @asynccontextmanager
    async def publishing(self, version: int) -> AsyncIterator[WeightUpdate]:
        update = DiskUpdate(version=version, path="/none", checksum=self.weight, bytes=8)
        self.exported.append(update)
        yield update
        self.released.append(update)

    async def save_checkpoint(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "weight.json").write_text(json.dumps(self.weight))

    async def load_checkpoint(self, directory: Path) -> None:
        self.weight = json.loads((directory / "weight.json").read_text())

    async def export_huggingface(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text("{}")

    async def close(self) -> None:
        self.events.append("close")
