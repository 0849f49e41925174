"""Rows of the batch that the monitor does not follow: their logits are looked at only for what is not finite."""

import math
from typing import Any

import numpy as np
import torch

from rollout_server.monitor.spec import PLAIN_ARG


class PlainRows:
    """Plain requests of the engine by their rows in the batch; `finish`: the sentinel that broken ones are forced to.

    `uids`: of the requests, by row. A request that the engine did not make has none and is not looked at.
    """

    def __init__(self, finish: int, device: torch.device) -> None:
        self.uids: dict[int, int] = {}
        self._finish = finish
        self._device = device

    def add(self, row: int, extra_args: dict[str, Any] | None) -> None:
        """Another request takes the row."""
        self.uids.pop(row, None)
        if extra_args and PLAIN_ARG in extra_args:
            self.uids[row] = extra_args[PLAIN_ARG]

    def remove(self, row: int) -> None:
        """The row is empty."""
        self.uids.pop(row, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        """A request moves to another row; with `swap` that row's moves here."""
        moved, displaced = self.uids.pop(source, None), self.uids.pop(target, None)
        if moved is not None:
            self.uids[target] = moved
        if swap and displaced is not None:
            self.uids[source] = displaced

    def end_broken(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Leave only the sentinel to rows that are not finite, in place: NaN, infinite, or nothing above -inf.

        `logits` `[batch, vocabulary]`. Returns bool `[len(uids)]`, in the order of `uids`; None if it is known that
        all are finite. The largest logit of a row tells, in one pass over the memory.
        """
        largest = logits.amax(1)
        if self._device.type == "cpu" and np.isfinite(largest.numpy()).all():
            return None
        rows = torch.tensor(list(self.uids)).to(self._device, non_blocking=True)
        broken = ~largest[rows].isfinite()
        only = torch.full((1, logits.shape[1]), -math.inf, device=self._device)
        only[0, self._finish] = 0.0
        logits[rows] = torch.where(broken.unsqueeze(1), only, logits[rows])
        return broken
