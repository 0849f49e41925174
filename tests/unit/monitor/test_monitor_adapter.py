"""The monitor's vLLM adapter, driven through vLLM's own `BatchUpdate`s, without an engine; where it is installed."""

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from common.config import DelimiterSegmentation, ErasurePolicy, FixedSegmentation
from common.segmentation import segment_length
from common.token_bytes import token_bytes
from rollout_server.monitor import Field, Judged
from rollout_server.monitor.adapters.plain_rows import PlainRows
from rollout_server.monitor.adapters.tables import PRIORS_KEPT
from rollout_server.monitor.adapters.vllm_v1 import DEPARTED_KEPT, SegmentMonitorProcessor
from rollout_server.monitor.records import Inbox, Outbox, Sender
from rollout_server.monitor.spec import PLAIN_ARG, Submission, policy_json
from tests.models import byte_tokenizer

VOCABULARY = 50
SENTINELS = (48, 49)
TOKENIZER = TemporaryDirectory()
byte_tokenizer(64).save_pretrained(TOKENIZER.name)
POLICY = policy_json(ErasurePolicy(segmentation=FixedSegmentation(length=2), max_erasures=0))


class LateOutbox(Outbox):
    """Reports only when told, as a GPU's does that waits for its copies to arrive."""

    def __init__(self, address: str) -> None:
        super().__init__(address, threaded=False)
        self._waiting: list[tuple[list[Sender], int, Judged]] = []

    def put(self, senders: list[Sender], step: int, judged: Judged) -> None:
        self._waiting.append((senders, step, judged))

    def arrive(self) -> None:
        for senders, step, judged in self._waiting:
            super().put(senders, step, judged)
        self._waiting.clear()


def processor(address: str, tokenizer: str = TOKENIZER.name, vocabulary: int = VOCABULARY) -> SegmentMonitorProcessor:
    """One that follows up to two requests at once."""
    config: Any = SimpleNamespace(
        additional_config={"e3rl": {"address": address, "sentinel_ids": SENTINELS, "version": 5}},
        model_config=SimpleNamespace(
            get_vocab_size=lambda: vocabulary,
            tokenizer=tokenizer,
            tokenizer_revision=None,
            trust_remote_code=False,
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=2),
    )
    return SegmentMonitorProcessor(config, torch.device("cpu"), is_pin_memory=False)


def params(
    uid: int,
    group: str = "",
    group_size: int = 1,
    limit: int = 2,
    kind: str = "usual",
    policy: str = POLICY,
    stops: tuple[int, ...] = (),
) -> SamplingParams:
    """Of a response of at most `limit` tokens in segments of two; a group of its own if none is named."""
    submission = Submission(
        uid=uid,
        group=group or str(uid),
        group_size=group_size,
        policy=policy,
        kind=kind,
        erasable=True,
        position=0,
        segment=0,
        attempt=0,
        erased_tokens=0,
        limit=limit,
        erased_limit=limit,
        temperature=1.0,
        engine_temperature=1.0,
        history=(0.0, 0.0, 0.0),
        stop_token_ids=stops,
        watched=False,
    )
    return SamplingParams(extra_args=submission.extra_args())


def test_a_request_whose_end_is_reported_after_it_left_gives_its_slot_back() -> None:
    inbox = Inbox()
    followed = processor(inbox.address)
    late = LateOutbox(inbox.address)
    followed._outbox.close()
    followed._outbox = late
    for uid in range(10 * DEPARTED_KEPT):
        output_ids: list[int] = []
        followed.update_state(BatchUpdate(1, removed=[], added=[(0, params(uid), None, output_ids)], moved=[]))
        for _ in range(2):
            followed.apply(torch.zeros(1, VOCABULARY))
            output_ids.append(7)
        assert followed.apply(torch.zeros(1, VOCABULARY)).argmax() == SENTINELS[1]
        output_ids.append(SENTINELS[1])
        followed.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
        late.arrive()
        followed.apply(torch.zeros(0, VOCABULARY))
    counters = followed.counters()
    late.close()
    inbox.close()
    assert counters["following"] == 0
    assert counters["slots"] <= 2 * DEPARTED_KEPT + 2


def test_tokens_that_end_responses_take_no_place_for_ever() -> None:
    inbox = Inbox()
    followed = processor(inbox.address)
    for uid in range(10 * DEPARTED_KEPT):
        stops = (uid % 40, 7) if uid % 2 else (uid % 40,)
        output_ids: list[int] = []
        rows = [(0, params(uid, limit=200, stops=stops), None, output_ids)]
        followed.update_state(BatchUpdate(1, removed=[], added=rows, moved=[]))
        for token in (41, stops[-1]):
            assert followed.apply(torch.zeros(1, VOCABULARY)).isfinite().sum() > 1
            output_ids.append(token)
        assert followed.apply(torch.zeros(1, VOCABULARY)).argmax() == SENTINELS[1]
        followed.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
    tables = len(followed._monitor._token_tables)
    followed._outbox.close()
    inbox.close()
    assert tables <= DEPARTED_KEPT + 3


def step(followed: SegmentMonitorProcessor, *rows: list[int]) -> None:
    """Sample a token for each row, the sentinel where it is forced."""
    logits = torch.zeros(len(rows), VOCABULARY)
    followed.apply(logits)
    for output_ids, row in zip(rows, logits, strict=True):
        output_ids.append(int(row.argmax()) if row.isfinite().sum() == 1 else 7)


def test_a_response_that_ended_as_its_caller_left_is_counted_once() -> None:
    inbox = Inbox()
    followed = processor(inbox.address)
    short, long = [], []
    rows = [(0, params(1, "both", 2), None, short), (1, params(2, "both", 2, 200), None, long)]
    followed.update_state(BatchUpdate(2, removed=[], added=rows, moved=[]))
    for _ in range(3):
        step(followed, short, long)
    # Others come and go until what was known of the first is forgotten.
    for uid in range(10, 11 + DEPARTED_KEPT):
        other: list[int] = []
        followed.update_state(BatchUpdate(2, removed=[], added=[(0, params(uid), None, other)], moved=[]))
        for _ in range(3):
            step(followed, other, long)
    followed.release([(1, "both")])
    assert followed.counters()["following"] == 2, "the long response and its group"
    followed.release([(2, "both")])
    followed.update_state(BatchUpdate(0, removed=[0, 1], added=[], moved=[]))
    followed._outbox.close()
    inbox.close()
    assert followed.counters()["following"] == 0


def test_a_group_whose_member_left_before_it_reached_the_batch_is_over_when_the_others_are() -> None:
    inbox = Inbox()
    followed = processor(inbox.address)
    followed.release([(1, "three")])
    for uid in (2, 3):
        output_ids: list[int] = []
        row = (0, params(uid, "three", 3), None, output_ids)
        followed.update_state(BatchUpdate(1, removed=[], added=[row], moved=[]))
        for _ in range(3):
            step(followed, output_ids)
        followed.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
        followed.apply(torch.zeros(0, VOCABULARY))
    assert followed.counters()["following"] == 1, "the group, which waits for a third"
    followed.release([], ["three", "unknown"])
    followed._outbox.close()
    inbox.close()
    assert followed.counters()["following"] == 0
    assert followed.priors()["usual"], "what the two taught is kept"


def plain(uid: int) -> SamplingParams:
    """Of a request without a monitor."""
    return SamplingParams(extra_args={PLAIN_ARG: uid})


def logits_with(broken: list[int], batch: int) -> torch.Tensor:
    """Logits of a batch in which the rows `broken` are not finite."""
    logits = torch.zeros(batch, VOCABULARY)
    logits[broken, 7] = math.nan
    return logits


def test_only_broken_rows_are_ended_and_each_is_reported_once() -> None:
    inbox = Inbox()
    followed = processor(inbox.address)
    rows = [
        (0, plain(11), None, []),
        (1, params(12, limit=9), None, []),
        (2, plain(13), None, []),
        (3, SamplingParams(), None, []),
    ]
    followed.update_state(BatchUpdate(4, removed=[], added=rows, moved=[]))
    for _ in range(2):
        logits = followed.apply(logits_with([1, 2, 3], 4))
        assert logits[1].isfinite().nonzero().tolist() == logits[2].isfinite().nonzero().tolist() == [[SENTINELS[1]]]
        assert logits[0].tolist() == [0.0] * VOCABULARY
        assert math.isnan(logits[3, 7]), "a request that is not the engine's own is left alone"
    assert [followed.non_finite(uid) for uid in (11, 12, 13)] == [None, 5, 5]
    assert not followed._outbox.ended, "what the first step reported was collected in the second, and nothing since"
    followed._outbox.close()
    inbox.close()


BATCH = 5


@given(st.data())
def test_a_plain_request_is_told_of_its_own_row_however_the_batch_moves(data: st.DataObject) -> None:
    """Against a plain list of rows, through whatever vLLM may do to its batch."""
    rows = PlainRows(SENTINELS[1], torch.device("cpu"))
    model: list[int | None] = [None] * BATCH
    places = st.integers(0, BATCH - 1)
    for uid in range(1, 12):
        kind, row, other = data.draw(
            st.tuples(st.sampled_from(["add", "other", "remove", "move", "swap"]), places, places)
        )
        if kind == "add":
            rows.add(row, {PLAIN_ARG: uid})
            model[row] = uid
        elif kind == "other":
            rows.add(row, None)
            model[row] = None
        elif kind == "remove":
            rows.remove(row)
            model[row] = None
        elif row != other:
            rows.move(row, other, swap=kind == "swap")
            model[other], model[row] = model[row], model[other] if kind == "swap" else None
        broken = data.draw(st.sets(places))
        found = rows.end_broken(logits_with(sorted(broken), BATCH)) if rows.uids else None
        ended = set() if found is None else {uid for uid, bad in zip(rows.uids, found.tolist(), strict=False) if bad}
        ended = {rows.uids[uid] for uid in ended}
        assert ended == {model[place] for place in broken} - {None}


def respond(followed: SegmentMonitorProcessor, *requests: SamplingParams, surprise: float = 0.0) -> None:
    """Generate two tokens of each request and end it. `surprise`: how much less likely than others they are."""
    outputs: list[list[int]] = [[] for _ in requests]
    added = [
        (index, request, None, output) for index, (request, output) in enumerate(zip(requests, outputs, strict=True))
    ]
    followed.update_state(BatchUpdate(len(requests), removed=[], added=added, moved=[]))
    for _ in range(3):
        logits = torch.zeros(len(requests), VOCABULARY)
        logits[:, 7] = -surprise
        followed.apply(logits)
        for output, row in zip(outputs, logits, strict=True):
            output.append(int(row.argmax()) if row.isfinite().sum() == 1 else 7)
    followed.update_state(BatchUpdate(0, removed=list(range(len(requests))), added=[], moved=[]))
    followed.apply(torch.zeros(0, VOCABULARY))


@pytest.fixture
def followed() -> Iterator[SegmentMonitorProcessor]:
    inbox = Inbox()
    monitor = processor(inbox.address)
    yield monitor
    monitor._outbox.close()
    inbox.close()


def test_members_of_a_group_that_are_not_comparable_have_statistics_and_priors_of_their_own(
    followed: SegmentMonitorProcessor,
) -> None:
    respond(followed, params(1, "mixed", 4, kind="cold"), params(2, "mixed", 4, kind="warm"), surprise=0.0)
    respond(followed, params(3, "mixed", 4, kind="warm"), surprise=2.0)
    assert followed.priors() == {"cold": [], "warm": []}
    respond(followed, params(4, "mixed", 4, kind="cold"), surprise=0.0)
    assert followed.counters()["following"] == 0
    (cold,), (warm,) = followed.priors().values()
    plain, surprised = math.log(VOCABULARY), math.log(VOCABULARY - 1 + math.exp(-2.0)) + 2.0
    assert cold == pytest.approx([1.0, plain, plain**2], abs=1e-4)
    assert warm == pytest.approx([1.0, (plain + surprised) / 2, (plain**2 + surprised**2) / 2], abs=1e-4)


def test_the_prior_of_an_open_group_is_not_given_to_another_kind(followed: SegmentMonitorProcessor) -> None:
    respond(followed, params(1, "open", 2, kind="kept"), surprise=3.0)
    for uid in range(2, PRIORS_KEPT + 50):
        respond(followed, params(uid, kind=f"kind {uid}"))
    assert len(followed.priors()) == PRIORS_KEPT
    respond(followed, params(10_000, "open", 2, kind="kept"), surprise=3.0)
    priors = followed.priors()
    assert priors["kept"][0][1] == pytest.approx(math.log(VOCABULARY - 1 + math.exp(-3.0)) + 3.0, abs=1e-4)
    assert all(row[1] == pytest.approx(math.log(VOCABULARY), abs=1e-4) for k, (row,) in priors.items() if k != "kept")
    for uid in range(20_000, 20_000 + PRIORS_KEPT):
        respond(followed, params(uid, kind=f"kind {uid}"))
    assert "kept" not in followed.priors(), "the least lately used goes"


def test_a_group_that_may_erase_nothing_warms_the_prior_up_for_the_first_that_may(
    followed: SegmentMonitorProcessor,
) -> None:
    sent: list[tuple[list[Sender], int, Judged]] = []
    followed._outbox.put = lambda *what: sent.append(what)  # type: ignore[method-assign]
    erasing = policy_json(ErasurePolicy(segmentation=FixedSegmentation(length=2)))

    def verdict(uid: int, group: str, size: int, **kind: str) -> tuple[bool, bool]:
        """Of an uncertain response: whether there was a threshold, and whether it is erased."""
        respond(followed, params(uid, group, size, policy=erasing, **kind), surprise=5.0)
        fields = sent[-1][2].fields[0]
        return bool(fields[Field.THRESHOLD].isfinite()), bool(fields[Field.ERASED])

    cold = verdict(1, "cold", 1000, kind="another")
    assert cold == (False, False), "the first of a kind has nothing to be compared with"
    for uid in range(2, 6):
        respond(followed, params(uid, "warm-up", 4))
        followed._collect_ended()
    followed.release([(uid, "warm-up") for uid in range(2, 6)])
    assert verdict(10, "next", 1000) == (True, True)


@pytest.mark.parametrize("delimiter", [". ", ("</think>", "\n\n", "。")])
def test_segments_end_at_text_that_no_token_contains(
    everyday_model: Path, monkeypatch: pytest.MonkeyPatch, delimiter: str | tuple[str, ...]
) -> None:
    inbox = Inbox()
    tokenizer = AutoTokenizer.from_pretrained(everyday_model)
    followed = processor(inbox.address, str(everyday_model), len(tokenizer))
    ended: list[int] = []
    monkeypatch.setattr(
        followed._outbox, "put", lambda senders, step, judged: ended.append(int(judged.fields[0, Field.END]))
    )
    segmentation = DelimiterSegmentation(delimiter=delimiter, min_length=2, max_length=30)
    text = "<think>\nFirst, 1 + 2 = 3. So it is.\n</think>\n\n今日は天気。Yes. The answer is 3. Is it?\n\nEnd, as it"
    ids = tokenizer(text)["input_ids"]
    policy = policy_json(ErasurePolicy(segmentation=segmentation, max_erasures=0))
    output_ids: list[int] = []
    rows = [(0, params(1, limit=500, policy=policy), None, output_ids)]
    followed.update_state(BatchUpdate(1, removed=[], added=rows, moved=[]))
    for token in ids:
        followed.apply(torch.zeros(1, len(tokenizer)))
        output_ids.append(token)
    followed.apply(torch.zeros(1, len(tokenizer)))
    followed._outbox.close()
    inbox.close()
    texts = [tokenizer.decode([*ids[:1], i]).removeprefix(tokenizer.decode(ids[:1])) for i in ids]
    assert not any(d in text for text in texts for d in [delimiter] if isinstance(d, str))
    known, start, expected = token_bytes(tokenizer), 0, []
    while (length := segment_length([known[i] for i in ids[start:]], segmentation, 500)) is not None:
        start += length
        expected.append(start)
    assert ended == expected
    assert len(ended) >= 3


def test_an_installation_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path) -> None:
    for package in ("common", "rollout_server"):
        shutil.copytree(package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    # Files where directories would have to be made: root may write wherever it is forbidden.
    (tmp_path / "rollout_server" / "monitor" / "__pycache__").touch()
    script = """
import torch
from rollout_server.monitor import SegmentMonitor
monitor = SegmentMonitor(50, torch.device("cpu"), (48, 49), [b"a"] * 48)
assert monitor.observe(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)) is None
"""
    environment = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)


def test_records_say_which_weights_sampled_each_token(followed: SegmentMonitorProcessor) -> None:
    """One request is under way at two syncs, between them it is preempted; another begins after them."""
    sent: list[tuple[list[Sender], int, Judged]] = []
    followed._outbox.put = lambda *what: sent.append(what)  # type: ignore[method-assign]
    output_ids: list[int] = []

    def enter(uid: int, output_ids: list[int]) -> None:
        rows = [(0, params(uid, limit=50), None, output_ids)]
        followed.update_state(BatchUpdate(1, removed=[], added=rows, moved=[]))

    def steps(count: int) -> None:
        for _ in range(count):
            followed.apply(torch.zeros(1, VOCABULARY))
            output_ids.append(7)

    enter(1, output_ids)
    steps(3)
    followed.weights_changed(6)
    followed.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
    followed.weights_changed(8)
    output_ids = list(output_ids)
    enter(1, output_ids)
    steps(4)
    assert sent[-1][0][0][3] == [(0, 5), (3, 6), (3, 8)]
    followed.update_state(BatchUpdate(0, removed=[0], added=[], moved=[]))
    output_ids = []
    enter(2, output_ids)
    steps(4)
    assert sent[-1][0][0][3] == [(0, 8)]
