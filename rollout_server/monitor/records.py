"""Judgements on their way from the monitor, in vLLM's worker process, to the erasable engine.

A ZeroMQ push/pull pair over a Unix socket: the engine's step is never stopped to fetch them. A message leaves when a
judgement ends a request or somebody watches, and carries all that was judged since the last one. The record of a
judgement that ends a request is on its way before the sentinel that it led to is sampled. So is the record of logits
that are not finite, which end their request too.
"""

import os
import queue
import shutil
import tempfile
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import torch
import zmq
import zmq.asyncio

from rollout_server.monitor import Field, Judged

INBOX_LINGER_MS = 1000
FLUSH_SECONDS = 10.0
NON_FINITE_KEPT = 65536
"""Requests of which it is remembered that their logits were not finite: far more than are under way at once."""

Versions = list[tuple[int, int]]
"""Positions in a response, and the version of the weights from there on, in order."""

Sender = tuple[int, int, bool, Versions]
"""A submission's uid, the engine step in which its first token was sampled, whether somebody watches it, and which
weights sampled it."""


class JudgementRecord(msgspec.Struct, array_like=True, tag=0):
    """One judged segment of the submission `uid`.

    `opened`, `step`: engine steps in which the submission's first token was sampled and the segment was judged.
    `fields`: by `rollout_server.monitor.Field`. `tokens`: float32 bytes of `[tokens, 3]`, as in `Judged.tokens`.
    `versions`: of the weights that sampled the submission's tokens.
    """

    uid: int
    opened: int
    step: int
    fields: list[float]
    tokens: bytes
    versions: Versions

    def field(self, field: Field) -> float:
        return self.fields[field]

    @property
    def erased(self) -> bool:
        return self.fields[Field.ERASED] > 0.0

    @property
    def final(self) -> bool:
        """The last segment of the response, and accepted."""
        return self.fields[Field.FINAL] > 0.0 and not self.erased

    @property
    def per_token(self) -> np.ndarray:
        """Log-probability, behaviour log-probability and signal, float32 `[tokens, 3]`."""
        return np.frombuffer(self.tokens, dtype=np.float32).reshape(-1, 3)


class NonFiniteRecord(msgspec.Struct, array_like=True, tag=1):
    """The weights of `version` gave the request `uid` logits that are not finite; it was forced to its end."""

    uid: int
    version: int


Record = JudgementRecord | NonFiniteRecord


class Outbox:
    """The monitor's side. On a GPU a thread waits for the copies to the host, so that no step does.

    Submissions that a record ends are in `ended` once the record has left, for the adapter to collect. `non_finite`:
    weight versions of requests whose logits were not finite, by uid. Without an address nothing is sent: another
    process says the same.
    """

    def __init__(self, address: str | None, threaded: bool) -> None:
        self.ended: deque[tuple[int, bool]] = deque()
        self.non_finite: OrderedDict[int, int] = OrderedDict()
        self._held: list[Record] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._socket: zmq.Socket[bytes] | None = None
        if address is not None:
            self._socket = zmq.Context.instance().socket(zmq.PUSH)
            self._socket.set_hwm(0)
            self._socket.setsockopt(zmq.LINGER, INBOX_LINGER_MS)
            self._socket.connect(address)
        self._queue: queue.SimpleQueue[tuple[Callable[[], None], torch.cuda.Event | None]] | None = None
        if threaded:
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._drain, args=(self._queue,), daemon=True, name="e3rl-outbox").start()

    def put(self, senders: list[Sender], step: int, judged: Judged) -> None:
        """Send what a step judged, or hold it; `senders` `[judged]` names the rows. Returns at once."""
        if self._queue is None:
            self._send(senders, step, judged)
            return
        copied = Judged(
            judged.slots,
            judged.fields.to("cpu", non_blocking=True),
            judged.tokens.to("cpu", non_blocking=True),
        )
        self._send_later(self._queue, partial(self._send, senders, step, copied))

    def put_non_finite(self, uids: list[int], broken: torch.Tensor, version: int) -> None:
        """Report the requests `uids` `[rows]` where `broken` `[rows]`: their logits are not finite. Returns at once."""
        if self._queue is None:
            self._send_non_finite(uids, broken, version)
            return
        copied = broken.to("cpu", non_blocking=True)
        self._send_later(self._queue, partial(self._send_non_finite, uids, copied, version))

    def flush(self) -> None:
        """Wait until what was put has left. Raises `TimeoutError`."""
        if self._queue is None:
            return
        done = threading.Event()
        self._queue.put((done.set, None))
        if not done.wait(FLUSH_SECONDS):
            raise TimeoutError(f"the monitor's records did not leave within {FLUSH_SECONDS:g} s")

    def close(self) -> None:
        """Close the socket once what was sent has left; in a worker the end of its process does that."""
        if self._socket is not None:
            self._socket.close()

    def _send_held(self) -> None:
        if self._socket is not None:
            self._socket.send(self._encoder.encode(self._held))
        self._held.clear()

    def _send_later(
        self, waiting: "queue.SimpleQueue[tuple[Callable[[], None], torch.cuda.Event | None]]", send: Callable[[], None]
    ) -> None:
        event = torch.cuda.Event()
        event.record()
        waiting.put((send, event))

    def _drain(self, waiting: "queue.SimpleQueue[tuple[Callable[[], None], torch.cuda.Event | None]]") -> None:
        while True:
            send, event = waiting.get()
            if event is not None:
                event.synchronize()
            send()

    def _send_non_finite(self, uids: list[int], broken: torch.Tensor, version: int) -> None:
        fresh = [uid for uid, row in zip(uids, broken.tolist(), strict=True) if row and uid not in self.non_finite]
        if not fresh:
            return
        self._held += [NonFiniteRecord(uid, version) for uid in fresh]
        self._send_held()
        self.non_finite.update(dict.fromkeys(fresh, version))
        while len(self.non_finite) > NON_FINITE_KEPT:
            self.non_finite.popitem(last=False)
        self.ended.extend((uid, True) for uid in fresh)

    def _send(self, senders: list[Sender], step: int, judged: Judged) -> None:
        tokens = judged.tokens.numpy()
        ended = []
        due = False
        for row, ((uid, opened, watched, versions), fields) in enumerate(
            zip(senders, judged.fields.tolist(), strict=True)
        ):
            if not fields[Field.JUDGED]:
                continue
            length = int(fields[Field.END] - fields[Field.START])
            record = JudgementRecord(uid, opened, step, fields, tokens[row, :length].tobytes(), versions)
            self._held.append(record)
            due |= watched
            if record.erased or record.final:
                ended.append((uid, record.final))
        if due or ended:
            self._send_held()
        self.ended.extend(ended)


class Inbox:
    """The engine's side: calls `deliver` for every record, in order, on the event loop that runs `receive`."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="e3rl-")
        self.address = f"ipc://{os.path.join(self._directory, 'records')}"
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(self.address)
        self._decoder = msgspec.msgpack.Decoder(list[Record])

    async def receive(self, deliver: Callable[[Record], None]) -> None:
        """Deliver records until cancelled."""
        while True:
            for record in self._decoder.decode(await self._socket.recv()):
                deliver(record)

    def close(self) -> None:
        self._socket.close(linger=0)
        shutil.rmtree(self._directory, ignore_errors=True)
