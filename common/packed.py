"""Responses as arrays: how they travel from a replica to the learner, and how the driver holds them.

A `PackedResponse` has a header, which the driver works with, and `TokenArrays`, which only those need that train on
the response or write it to a file. The arrays may be left where they were made: the header then has a reference.
`pack` and `unpack` lose nothing of a `Trajectory`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.erasure import ErasurePolicy
from common.repetition import repeated_share
from common.threshold import GroupStatistics, History
from common.trajectory import MEASURED, Attempt, FinishReason, Judgement, Prompt, Trajectory, VersionSpan

Integers = NDArray[np.int32]
Floats = NDArray[np.float32] | NDArray[np.float64]

Fetch = Callable[[list[Any]], "list[TokenArrays]"]
"""Gives what references lead to, in their order."""

PER_TOKEN = ("logprobs", "behaviour_logprobs", "signal")
STATISTICS = tuple(f"statistics.{f.name}" for f in fields(GroupStatistics))
HISTORY = tuple(f"history.{f.name}" for f in fields(History))
VALUES = ("temperature", *MEASURED, *STATISTICS, *HISTORY, "erased_tokens_before")
"""Columns of `AttemptTable.values`: after the temperature those of `Judgement`, null ones NaN."""

ERASED, JUDGED, HAS_BASELINE, HAS_THRESHOLD = 1, 2, 4, 8
"""Bits of `AttemptTable.flags`."""

HAS_COLUMN = {name: 16 << place for place, name in enumerate(PER_TOKEN)}
"""More bits: whether the attempt has these values. Those of a response without a monitor have none."""


@dataclass(frozen=True, slots=True, eq=False)
class AttemptTable:
    """The attempts of one response in the order of generation.

    `numbers`: `[attempts, 4]` segment, attempt, start and end. `flags`: `[attempts]`. `values`: `[attempts, VALUES]`.
    `spans`: `[spans, 4]` index of the attempt, start, end and version of each `VersionSpan`.
    """

    numbers: Integers
    flags: NDArray[np.uint8]
    values: NDArray[np.float64]
    spans: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.flags)

    @property
    def segments(self) -> Integers:
        return self.numbers[:, 0]

    @property
    def starts(self) -> Integers:
        return self.numbers[:, 2]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each attempt."""
        return self.numbers[:, 3].astype(np.int64) - self.numbers[:, 2]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """`[attempts + 1]`: attempt n has the places `offsets[n]` to `offsets[n + 1]` of the per-token arrays."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @property
    def erased(self) -> NDArray[np.bool_]:
        return self.having(ERASED)

    @property
    def accepted(self) -> NDArray[np.intp]:
        """Indices of the accepted attempts, one a segment, in order."""
        return np.flatnonzero(~self.erased)

    @property
    def judged(self) -> NDArray[np.bool_]:
        return self.having(JUDGED)

    def having(self, flag: int) -> NDArray[np.bool_]:
        """Which attempts have `flag`."""
        having: NDArray[np.bool_] = (self.flags & flag) != 0
        return having

    def column(self, name: str) -> NDArray[np.float64]:
        """One of `VALUES`, of each attempt; NaN where it is null."""
        return self.values[:, VALUES.index(name)]


@dataclass(frozen=True, slots=True, eq=False)
class TokenArrays:
    """What there is for every token: of the prompt its ids, of the attempts, one after another, everything.

    Log-probs and signal are float32 where that loses nothing, as of what an engine measures, else float64. They are
    empty where no attempt has them, and NaN for an attempt without them beside others.
    """

    prompt_token_ids: Integers
    token_ids: Integers
    logprobs: Floats
    behaviour_logprobs: Floats
    signal: Floats

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))


@dataclass(slots=True, eq=False)
class PackedResponse:
    """One response: the fields of `Trajectory`, and what the driver needs to know of its tokens.

    `text`: of the committed tokens, without special ones, up to the stop string that ended them. `attempt_texts`: of
    each attempt, where they were asked for. `repeated_share`: of the committed tokens. `behaviour_logprob_sum`: over
    all attempts. Either `tokens` are here, or `reference` leads to them.
    """

    prompt_id: str
    group_id: str
    sample: int
    seed: int
    erasable: bool
    finish_reason: FinishReason
    policy: ErasurePolicy | None
    erased_token_limit: int
    reused_prefix_tokens: int
    text: str
    reward: float | None
    attempt_texts: tuple[str, ...] | None
    prompt_tokens: int
    repeated_share: float
    behaviour_logprob_sum: float
    attempts: AttemptTable
    tokens: TokenArrays | None = field(repr=False)
    reference: Any = None

    @property
    def response_tokens(self) -> int:
        """Committed tokens."""
        return self.generated_tokens - self.erased_tokens

    @property
    def generated_tokens(self) -> int:
        """Committed and erased tokens."""
        return int(self.attempts.lengths.sum())

    @property
    def erased_tokens(self) -> int:
        return int(self.attempts.lengths[self.attempts.erased].sum())

    @property
    def erasures(self) -> int:
        return int(self.attempts.erased.sum())

    @property
    def behaviour_tokens(self) -> int:
        """Tokens that have a behaviour log-prob."""
        return int(self.attempts.lengths[self.attempts.having(HAS_COLUMN["behaviour_logprobs"])].sum())

    @property
    def oldest_version(self) -> int:
        """The oldest version of the weights that any of its committed tokens was sampled by."""
        spans = self.attempts.spans
        return int(spans[~self.attempts.erased[spans[:, 0]], 3].min())

    @property
    def arrays(self) -> TokenArrays:
        """The per-token arrays. Raises RuntimeError if only a reference to them is here."""
        if self.tokens is None:
            raise RuntimeError(
                f"the tokens of response {self.sample} to prompt {self.prompt_id!r} are elsewhere, at {self.reference}"
            )
        return self.tokens

    @property
    def token_ids(self) -> Integers:
        """Committed tokens. Raises RuntimeError if only a reference to them is here."""
        return committed(self.attempts, self.arrays.token_ids)


@dataclass(frozen=True, slots=True)
class Group:
    """The responses to one prompt, generated on one replica and judged together."""

    prompt: Prompt
    trajectories: list[PackedResponse]

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"the group of prompt {self.prompt.id!r} holds no response")
        strangers = {t.prompt_id for t in self.trajectories} - {self.prompt.id}
        if strangers:
            raise ValueError(f"group of prompt {self.prompt.id!r} holds responses to {sorted(strangers)}")


def fetched(responses: Sequence[PackedResponse], fetch: Fetch) -> list[TokenArrays]:
    """The arrays of each response: `fetch` gives those that are elsewhere, all together."""
    references = [response.reference for response in responses if response.tokens is None]
    found = iter(fetch(references) if references else ())
    return [next(found) if response.tokens is None else response.tokens for response in responses]


def no_fetch(references: list[Any]) -> list[TokenArrays]:
    """For where all arrays are at hand."""
    raise RuntimeError(f"the tokens of {len(references)} responses are elsewhere: at {references[0]}")


def committed(attempts: AttemptTable, values: NDArray[Any]) -> NDArray[Any]:
    """Of per-token values those of the accepted attempts, joined."""
    offsets = attempts.offsets
    return gathered(values, [(int(offsets[i]), int(offsets[i + 1])) for i in attempts.accepted])


def gathered(values: NDArray[Any], ranges: Iterable[Sequence[int]]) -> NDArray[Any]:
    """The places of `ranges`, each a start and an end, joined."""
    return np.concatenate([values[:0], *(values[start:end] for start, end in ranges)])


def pack(
    trajectory: Trajectory, text: str | None = None, attempt_texts: tuple[str, ...] | None = None
) -> PackedResponse:
    """The response as arrays, all of them here. `text`: if it is to have another one than `trajectory` has.

    Raises ValueError if lists of an attempt have other lengths than its `start` and `end` say.
    """
    attempts = trajectory.attempts
    for attempt in attempts:
        _check_lengths(trajectory, attempt)
    table = AttemptTable(
        numbers=np.array([(a.segment, a.attempt, a.start, a.end) for a in attempts], np.int32).reshape(-1, 4),
        flags=np.array([_flags(a) for a in attempts], np.uint8),
        values=np.array([_values(a) for a in attempts], np.float64).reshape(-1, len(VALUES)),
        spans=np.array(
            [(index, s.start, s.end, s.version) for index, a in enumerate(attempts) for s in a.versions], np.int64
        ).reshape(-1, 4),
    )
    tokens = TokenArrays(
        np.array(trajectory.prompt_token_ids, np.int32),
        np.array(list(itertools.chain.from_iterable(a.token_ids for a in attempts)), np.int32),
        *(_column(attempts, name) for name in PER_TOKEN),
    )
    # Of hand-made values the sum may be infinite, or no number.
    with np.errstate(all="ignore"):
        behaviour_logprob_sum = float(np.nansum(tokens.behaviour_logprobs, dtype=np.float64))
    return PackedResponse(
        prompt_id=trajectory.prompt_id,
        group_id=trajectory.group_id,
        sample=trajectory.sample,
        seed=trajectory.seed,
        erasable=trajectory.erasable,
        finish_reason=trajectory.finish_reason,
        policy=trajectory.policy,
        erased_token_limit=trajectory.erased_token_limit,
        reused_prefix_tokens=trajectory.reused_prefix_tokens,
        text=trajectory.text if text is None else text,
        reward=trajectory.reward,
        attempt_texts=attempt_texts,
        prompt_tokens=len(trajectory.prompt_token_ids),
        repeated_share=repeated_share(committed(table, tokens.token_ids)),
        behaviour_logprob_sum=behaviour_logprob_sum,
        attempts=table,
        tokens=tokens,
    )


def unpack(packed: PackedResponse) -> Trajectory:
    """The response as it was before `pack`, but for `text` and `reward`, which are those of now.

    Raises RuntimeError if only a reference to its tokens is here.
    """
    table, tokens = packed.attempts, packed.arrays
    offsets = table.offsets.tolist()
    spans: list[list[VersionSpan]] = [[] for _ in range(len(table))]
    for index, start, end, version in table.spans.tolist():
        spans[index].append(VersionSpan(start=start, end=end, version=version))
    attempts = []
    for index, (segment, number, start, end) in enumerate(table.numbers.tolist()):
        flags = int(table.flags[index])
        values = dict(zip(VALUES, table.values[index].tolist(), strict=True))
        own = slice(offsets[index], offsets[index + 1])
        columns = {n: getattr(tokens, n)[own].tolist() if flags & HAS_COLUMN[n] else [] for n in PER_TOKEN}
        attempts.append(
            Attempt(
                segment=segment,
                attempt=number,
                start=start,
                end=end,
                token_ids=tokens.token_ids[own].tolist(),
                **columns,
                temperature=values["temperature"],
                versions=spans[index],
                verdict="erased" if flags & ERASED else "accepted",
                judgement=_judgement(flags, values) if flags & JUDGED else None,
            )
        )
    return Trajectory(
        prompt_id=packed.prompt_id,
        group_id=packed.group_id,
        sample=packed.sample,
        seed=packed.seed,
        prompt_token_ids=tokens.prompt_token_ids.tolist(),
        attempts=attempts,
        erasable=packed.erasable,
        finish_reason=packed.finish_reason,
        policy=packed.policy,
        erased_token_limit=packed.erased_token_limit,
        reused_prefix_tokens=packed.reused_prefix_tokens,
        text=packed.text,
        reward=packed.reward,
    )


def lossless_floats(values: Sequence[float]) -> Floats:
    """As float32 if each value is one, else as float64."""
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    return short if np.array_equal(short, exact, equal_nan=True) else exact


def _check_lengths(trajectory: Trajectory, attempt: Attempt) -> None:
    length = attempt.end - attempt.start
    wrong = [name for name in PER_TOKEN if len(getattr(attempt, name)) not in (0, length)]
    if len(attempt.token_ids) != length:
        wrong.insert(0, "token_ids")
    if wrong:
        raise ValueError(
            f"response {trajectory.sample} to prompt {trajectory.prompt_id!r}: attempt {attempt.attempt} at segment "
            f"{attempt.segment} is of tokens {attempt.start} to {attempt.end}, but has "
            + ", ".join(f"{len(getattr(attempt, name))} {name}" for name in wrong)
        )


def _flags(attempt: Attempt) -> int:
    judgement = attempt.judgement
    flags = ERASED * (attempt.verdict == "erased")
    if judgement is not None:
        flags |= JUDGED
        flags |= HAS_BASELINE * (judgement.baseline is not None) | HAS_THRESHOLD * (judgement.threshold is not None)
    for name, bit in HAS_COLUMN.items():
        # An attempt of no tokens has the values of all of them.
        flags |= bit * (len(getattr(attempt, name)) == attempt.end - attempt.start)
    return flags


def _values(attempt: Attempt) -> list[float]:
    judgement = attempt.judgement
    if judgement is None:
        return [attempt.temperature, *(math.nan for _ in VALUES[1:])]
    measured = (getattr(judgement, name) for name in MEASURED)
    return [
        attempt.temperature,
        *(math.nan if value is None else value for value in measured),
        *(getattr(judgement.statistics, f.name) for f in fields(GroupStatistics)),
        *(getattr(judgement.history, f.name) for f in fields(History)),
        judgement.erased_tokens_before,
    ]


def _column(attempts: Sequence[Attempt], name: str) -> Floats:
    lists: list[list[float]] = [getattr(attempt, name) for attempt in attempts]
    if not any(lists):
        return np.zeros(0, np.float32)
    filled = (own or [math.nan] * (a.end - a.start) for own, a in zip(lists, attempts, strict=True))
    return lossless_floats(list(itertools.chain.from_iterable(filled)))


def _judgement(flags: int, values: dict[str, float]) -> Judgement:
    measured: dict[str, Any] = {name: values[name] for name in MEASURED}
    if not flags & HAS_BASELINE:
        measured["baseline"] = None
    if not flags & HAS_THRESHOLD:
        measured["threshold"] = None
    return Judgement(
        **measured,
        statistics=GroupStatistics(*(values[name] for name in STATISTICS)),
        history=History(*(values[name] for name in HISTORY)),
        erased_tokens_before=int(values["erased_tokens_before"]),
    )
