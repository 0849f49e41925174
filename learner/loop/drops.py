"""What of generation is dropped as too old, by treatment, and whether erasure is hit harder than the rest."""

from collections.abc import Iterable, Sequence

from common import metrics as names
from common.config import StrictModel
from common.packed import PackedResponse
from learner.loop.buffer import ScoredGroup, Taken

DECAY = 0.98
"""Of the running rates, a step: they are of about the last 50."""


class DropCounts(StrictModel):
    """Running counts of responses that took something back and of the others: dropped, and in all."""

    dropped_erased: float = 0.0
    dropped_others: float = 0.0
    erased: float = 0.0
    others: float = 0.0


class Drops:
    """Counts drops. `counts` are part of a checkpoint.

    Groups are dropped as a whole, so that plain and treated members of mixed groups are dropped alike; but the more a
    group takes back, the longer it takes. Rates are therefore by whether a response took anything back.
    """

    def __init__(self, counts: DropCounts) -> None:
        self.counts = counts

    def add(self, taken: Taken) -> dict[str, float | None]:
        """A step's metrics; a rate over nothing is None."""
        before, both = self.counts, [*taken.dropped, *taken.groups]
        self.counts = counts = DropCounts(
            dropped_erased=DECAY * before.dropped_erased + _count(taken.dropped, erased=True),
            dropped_others=DECAY * before.dropped_others + _count(taken.dropped, erased=False),
            erased=DECAY * before.erased + _count(both, erased=True),
            others=DECAY * before.others + _count(both, erased=False),
        )
        erased_rate = counts.dropped_erased / counts.erased if counts.erased else None
        other_rate = counts.dropped_others / counts.others if counts.others else None
        known = erased_rate is not None and other_rate is not None
        plain = [r for group in taken.dropped for r in _responses([group]) if r.sample < group.first_treated]
        treated = [r for group in taken.dropped for r in _responses([group]) if r.sample >= group.first_treated]
        return {
            names.DROPPED_GROUPS: len(taken.dropped),
            names.DROPPED_PLAIN: len(plain),
            names.DROPPED_TREATED: len(treated),
            names.DROPPED_PLAIN_TOKENS: generated_tokens(plain),
            names.DROPPED_TREATED_TOKENS: generated_tokens(treated),
            names.DROP_RATE_ERASED: erased_rate,
            names.DROP_RATE_OTHERS: other_rate,
            names.DROP_BIAS: (erased_rate or 0.0) - (other_rate or 0.0) if known else None,
        }


def generated_tokens(responses: Iterable[PackedResponse]) -> int:
    """Of all responses together."""
    return sum(response.generated_tokens for response in responses)


def _responses(groups: Sequence[ScoredGroup]) -> list[PackedResponse]:
    return [response for group in groups for response in group.group.trajectories]


def _count(groups: Sequence[ScoredGroup], erased: bool) -> int:
    return sum((response.erasures > 0) == erased for response in _responses(groups))
