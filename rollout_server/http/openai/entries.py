"""Log-probs of tokens, as an answer tells them."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Protocol

from rollout_server.engine.listener import PromptScores


class Rows(Protocol):
    """Tokens of a text, with what is known of each."""

    @property
    def token_ids(self) -> Iterable[int]: ...

    @property
    def logprobs(self) -> Iterable[float | None]:
        """None where nothing is known."""
        ...

    def likeliest(self) -> Iterable[dict[int, float] | None]:
        """The likeliest tokens at each place, likeliest first."""
        ...


class Entries:
    """Of a response's committed tokens.

    In flat arrays: an object for each token of many long responses would keep the garbage collector busy for longer
    than the event loop may be held, and so would freeing them all at once.
    """

    __slots__ = ("_ends", "_likeliest", "_values", "logprobs", "token_ids")

    def __init__(self) -> None:
        self.token_ids = array("q")
        self.logprobs = array("d")
        self._likeliest = array("q")
        self._values = array("d")
        self._ends = array("q", [0])

    def add(self, token_id: int, logprob: float, likeliest: Iterable[tuple[int, float]] = ()) -> None:
        """One token."""
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        for other, value in likeliest:
            self._likeliest.append(other)
            self._values.append(value)
        self._ends.append(len(self._likeliest))

    def extend(self, others: "Entries") -> None:
        """The tokens of others, after these."""
        before = len(self._likeliest)
        self.token_ids += others.token_ids
        self.logprobs += others.logprobs
        self._likeliest += others._likeliest
        self._values += others._values
        self._ends.extend(before + end for end in others._ends[1:])

    def first(self, count: int) -> "Entries":
        """Those of the first `count` tokens."""
        if count >= len(self):
            return self
        result = Entries()
        end = self._ends[count]
        result.token_ids, result.logprobs = self.token_ids[:count], self.logprobs[:count]
        result._likeliest, result._values = self._likeliest[:end], self._values[:end]
        result._ends = self._ends[: count + 1]
        return result

    def likeliest(self) -> Iterator[dict[int, float]]:
        for start, end in pairwise(self._ends):
            yield dict(zip(self._likeliest[start:end], self._values[start:end], strict=True))

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Of a prompt's tokens, of which the `top` likeliest are told."""

    token_ids: list[int]
    scores: PromptScores
    top: int

    @property
    def logprobs(self) -> Iterator[float | None]:
        for token_id, known in zip(self.token_ids, self.scores, strict=True):
            yield None if known is None else known[token_id][0]

    def likeliest(self) -> Iterator[dict[int, float] | None]:
        for known in self.scores:
            if known is None:
                yield None
            else:
                yield {token: value for token, (value, rank) in known.items() if rank <= self.top}


@dataclass(frozen=True, slots=True)
class Joined:
    """One after the other."""

    first: Rows
    second: Rows

    @property
    def token_ids(self) -> Iterable[int]:
        return chain(self.first.token_ids, self.second.token_ids)

    @property
    def logprobs(self) -> Iterable[float | None]:
        return chain(self.first.logprobs, self.second.logprobs)

    def likeliest(self) -> Iterable[dict[int, float] | None]:
        return chain(self.first.likeliest(), self.second.likeliest())
