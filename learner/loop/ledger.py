"""The ledger of prompts: whose turn it is, who is under way, who was trained. Every prompt of an epoch is trained once.

Turns have numbers: turn 0 is the first prompt of the first epoch's order, and one turn follows the other through all
epochs. All random choices of a turn derive from its number, so that it does not matter when it is taken.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from common.config import StrictModel
from common.trajectory import Prompt
from learner.environments.data import PromptStream

Stage = Literal["waiting", "in flight", "scored", "taken"]


class LedgerState(StrictModel):
    """The ledger in a checkpoint.

    `prompts`: of an epoch. `drawn`: turns that were drawn at least once. `untrained`: those of them that were not
    trained, whose responses are generated again. `dropped`: those of these whose responses were once too old.
    """

    prompts: int = 0
    drawn: int = 0
    untrained: list[int] = Field(default_factory=list)
    dropped: list[int] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt's turn, as the ledger gives it out.

    `step`: the one that trains it where nothing overtakes anything, counted from 1. `twice`: empty, or what tells it
    from another turn of the same prompt in that step. `version`: of the policy when it was drawn. `drops`: how often
    its responses were too old before.
    """

    number: int
    epoch: int
    prompt: Prompt
    step: int
    twice: tuple[int, ...]
    version: int
    drops: int

    @property
    def seed_place(self) -> tuple[int | str, ...]:
        """The place that its responses' seeds derive from; the same ones after a drop or a resume.

        Other seeds would give other lengths, and what is dropped or lost is rather long: training would come to see
        shorter responses than the policy gives.
        """
        return (self.step, self.prompt.id, *self.twice)

    @property
    def group_id(self) -> str:
        """Names the group of its responses, a new one after a drop."""
        again = (f"again{self.drops}",) if self.drops else ()
        return "-".join(map(str, (self.step, self.prompt.id, *self.twice, *again)))


class Ledger:
    """Where each turn is. A turn is waiting, in flight, scored, taken by the trainer, and then trained.

    From `scored` it may be dropped, and waits again. An order of calls that skips a stage raises RuntimeError.
    """

    def __init__(self, stream: PromptStream, groups_per_step: int, state: LedgerState | None = None) -> None:
        """`state` of other prompts means nothing here, and the ledger begins anew."""
        self._stream = stream
        self._groups_per_step = groups_per_step
        given = state if state is not None and state.prompts == len(stream) else LedgerState()
        self._next = given.drawn
        # Only of turns that were drawn and not trained; in ascending order where it is made, not afterwards.
        self._stages: dict[int, Stage] = dict.fromkeys(sorted(given.untrained), "waiting")
        self._drops: dict[int, int] = dict.fromkeys(given.dropped, 1)
        self._versions: dict[int, int] = {}

    @property
    def outstanding(self) -> int:
        """Turns that are under way: in flight, scored or taken."""
        return sum(stage != "waiting" for stage in self._stages.values())

    @property
    def trained(self) -> int:
        """Turns that are over."""
        return self._next - len(self._stages)

    def draw(self, version: int) -> Draw:
        """The lowest turn that waits, or else the next new one, under the policy `version`."""
        waiting = [number for number, stage in self._stages.items() if stage == "waiting"]
        number = min(waiting, default=self._next)
        if number == self._next:
            self._next += 1
        self._stages[number] = "in flight"
        self._versions[number] = version
        return self._draw(number, version)

    def score(self, number: int) -> None:
        """The turn's responses are there, with their rewards."""
        self._move(number, "in flight", "scored")

    def take(self, numbers: Iterable[int]) -> None:
        """The trainer has the turns' responses."""
        for number in numbers:
            self._move(number, "scored", "taken")

    def drop(self, number: int) -> None:
        """The turn's responses are too old to be trained on: others are to be generated."""
        self._move(number, "scored", "waiting")
        self._drops[number] = self._drops.get(number, 0) + 1

    def train(self, numbers: Iterable[int]) -> None:
        """The turns are over."""
        for number in numbers:
            self._move(number, "taken", "taken")
            del self._stages[number]
            del self._versions[number]
            self._drops.pop(number, None)

    def awaited(self, version: int) -> int:
        """Turns in flight since the policy `version` whose responses were dropped before."""
        return sum(
            stage == "in flight" and self._versions[number] == version and number in self._drops
            for number, stage in self._stages.items()
        )

    def state(self) -> LedgerState:
        """For a checkpoint: what is under way counts as untrained."""
        untrained = sorted(self._stages)
        return LedgerState(
            prompts=len(self._stream), drawn=self._next, untrained=untrained, dropped=sorted(self._drops)
        )

    def _move(self, number: int, before: Stage, after: Stage) -> None:
        found = self._stages.get(number)
        if found != before:
            raise RuntimeError(f"turn {number} should be {before}, and is {found or 'not under way'}")
        self._stages[number] = after

    def _draw(self, number: int, version: int) -> Draw:
        length, first = len(self._stream), number - number % self._groups_per_step
        epoch = number // length
        return Draw(
            number=number,
            epoch=epoch,
            prompt=self._stream.at(number),
            step=number // self._groups_per_step + 1,
            # Where an epoch ends within a step, a prompt may stand in it twice.
            twice=() if first // length == epoch else (epoch,),
            version=version,
            drops=self._drops.get(number, 0),
        )
