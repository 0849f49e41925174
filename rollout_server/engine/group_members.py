"""Which groups the monitor waits for in vain: not all of their responses come to their end."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

REMEMBERED = 4096
"""Groups that lost a response: others of theirs may come later."""


class GroupMembers:
    """Responses under way, by group.

    The monitor keeps a group's statistics until as many responses have ended as the group has. It does not see those
    that end before they reach the engine's batch, or never begin because their caller left. So a group that lost a
    response is over when none of its others is under way.
    """

    def __init__(self) -> None:
        self._under_way: Counter[str] = Counter()
        self._incomplete: OrderedDict[str, None] = OrderedDict()
        self._over: dict[str, None] = {}

    def __len__(self) -> int:
        """Groups that are over and were not taken."""
        return len(self._over)

    @contextmanager
    def member(self, group: str) -> Iterator[None]:
        """One response, from its call to its end; one that fails or is cancelled leaves its group incomplete."""
        self._under_way[group] += 1
        try:
            yield
        except BaseException:
            self._incomplete[group] = None
            self._incomplete.move_to_end(group)
            if len(self._incomplete) > REMEMBERED:
                self._incomplete.popitem(last=False)
            raise
        finally:
            self._under_way[group] -= 1
            if not self._under_way[group]:
                del self._under_way[group]
                if group in self._incomplete:
                    self._over[group] = None

    def take_over(self) -> list[str]:
        """Incomplete groups that are over: each once, unless another response of theirs begins and ends."""
        over = [group for group in self._over if group not in self._under_way]
        self._over.clear()
        return over

    def put_back(self, over: list[str]) -> None:
        """What was taken is to be taken again."""
        self._over.update(dict.fromkeys(over))
