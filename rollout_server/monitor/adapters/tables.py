"""Rows of the monitor's tables that responses share: statistics of groups, priors, tokens that end responses."""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from rollout_server.monitor import SegmentMonitor

PRIORS_KEPT = 256


@dataclass(frozen=True, slots=True)
class Statistics:
    """Rows of a group's statistics and of the prior that they are folded into, with its decay."""

    row: int
    prior: int
    decay: float


@dataclass(slots=True)
class _Group:
    """Responses judged together and how many there are; `finished`: the last submissions of those that have finished.

    `statistics`, by kind: only what is comparable is compared, so a group in which temperatures differ has several.
    """

    size: int
    statistics: dict[str, Statistics] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)


class GroupTable:
    """Which groups are open, and the priors that they are folded into when their last response has finished."""

    def __init__(self, monitor: SegmentMonitor) -> None:
        self._monitor = monitor
        self._groups: dict[str, _Group] = {}
        self._free_rows: list[int] = []
        self._rows = 0
        self._priors: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._groups)

    def enter(self, name: str, size: int, kind: str, prior_decay: float) -> Statistics:
        """Where a response is counted; the first of a group and kind opens it."""
        group = self._groups.setdefault(name, _Group(size))
        statistics = group.statistics.get(kind)
        if statistics is None:
            if not self._free_rows:
                self._free_rows.append(self._rows)
                self._rows += 1
            row = self._free_rows.pop()
            self._monitor.open_group(row)
            statistics = Statistics(row, self._prior_row(kind), prior_decay)
            group.statistics[kind] = statistics
        return statistics

    def member_finished(self, name: str, uid: int) -> None:
        """Count a response by its last submission: one may finish here and be reported as aborted too."""
        group = self._groups.get(name)
        if group is None:
            return
        group.finished.add(uid)
        if len(group.finished) == group.size:
            self.close(name)

    def close(self, name: str) -> None:
        """Fold a group's statistics into the priors, and give back its rows; nothing if it is not open."""
        group = self._groups.pop(name, None)
        for statistics in () if group is None else group.statistics.values():
            self._monitor.close_group(statistics.row, statistics.prior, statistics.decay)
            self._free_rows.append(statistics.row)

    def priors(self) -> dict[str, list[list[float]]]:
        """The statistics of earlier groups, by kind of response."""
        return {kind: self._monitor.prior(row) for kind, row in self._priors.items()}

    def restore_priors(self, priors: dict[str, list[list[float]]]) -> None:
        """Take over what `priors` gave."""
        for kind, values in priors.items():
            self._monitor.set_prior(self._prior_row(kind), values)

    def _prior_row(self, kind: str) -> int:
        """Row of the prior for responses of one kind; the one that was used least lately gives its row to a new one.

        Not where a group that is open will be folded into it, or is judged by it: then there are more for a while.
        """
        if kind in self._priors:
            self._priors.move_to_end(kind)
            return self._priors[kind]
        row = len(self._priors)
        if row >= PRIORS_KEPT:
            in_use = {kind for group in self._groups.values() for kind in group.statistics}
            oldest = next((kind for kind in self._priors if kind not in in_use), None)
            row = row if oldest is None else self._priors.pop(oldest)
        self._monitor.clear_prior(row)
        self._priors[kind] = row
        return row


class StopTable:
    """Sets of tokens that end responses. Responses with the same set share its row."""

    def __init__(self, monitor: SegmentMonitor) -> None:
        self._monitor = monitor
        self._rows: dict[tuple[int, ...], tuple[int, int]] = {}
        """Row, and how many submissions need it."""
        self._free: list[int] = []

    def take(self, token_ids: tuple[int, ...]) -> int:
        """Row of a table of the tokens that end a response; it is theirs until it was given back as often as taken."""
        if not token_ids:
            return 0
        row, uses = self._rows.get(token_ids, (None, 0))
        if row is None:
            replaced = self._free.pop() if self._free else None
            row = self._monitor.add_token_table(torch.tensor(token_ids), replaced)
        self._rows[token_ids] = row, uses + 1
        return row

    def give_back(self, token_ids: tuple[int, ...]) -> None:
        """One submission less needs the table of these tokens."""
        if not token_ids:
            return
        row, uses = self._rows[token_ids]
        if uses > 1:
            self._rows[token_ids] = row, uses - 1
        else:
            del self._rows[token_ids]
            self._free.append(row)
