"""What is dropped as too old: counted by treatment, and told where erasure is hit harder than the rest."""

from collections.abc import Sequence

import pytest

from common import metrics as names
from common.config.run import WarningsConfig
from common.packed import Group, pack
from common.trajectory import Prompt
from learner.environments.rewards import Tally
from learner.loop.buffer import ScoredGroup, Taken
from learner.loop.drops import DropCounts, Drops
from learner.loop.ledger import Draw
from learner.loop.watch import Watch
from tests.trajectories import attempt_of, trajectory


def taken(trained: Sequence[ScoredGroup], dropped: Sequence[ScoredGroup]) -> Taken:
    return Taken(version=5, groups=list(trained), dropped=list(dropped), depth=0)


def scored_group(erasures: Sequence[int]) -> ScoredGroup:
    """A group whose members took so many attempts back, of 2 tokens each; the second half was treated."""
    members = []
    for sample, count in enumerate(erasures):
        attempts = [attempt_of([7, 8], segment=0, start=0, number=n, verdict="erased") for n in range(count)]
        attempts.append(attempt_of([7, 8], segment=0, start=0, number=count))
        members.append(pack(trajectory(attempts, reward=0.0, sample=sample)))
    prompt = Prompt(id="p0", text="", token_ids=[1])
    draw = Draw(0, 0, prompt, 1, (), 0, 0)
    return ScoredGroup(draw, Group(prompt=prompt, trajectories=members), 0, len(erasures) // 2, Tally(len(erasures)))


def test_drops_are_counted_by_treatment():
    metrics = Drops(DropCounts()).add(taken([scored_group([0, 0])], [scored_group([0, 1, 2, 3]), scored_group([0, 1])]))
    assert metrics[names.DROPPED_GROUPS] == 2
    assert (metrics[names.DROPPED_PLAIN], metrics[names.DROPPED_TREATED]) == (3, 3)
    assert metrics[names.DROPPED_PLAIN_TOKENS] == 2 * (1 + 2 + 1)
    assert metrics[names.DROPPED_TREATED_TOKENS] == 2 * (3 + 4 + 2)
    # Of four responses that took something back all were dropped, of four others two.
    assert metrics[names.DROP_RATE_ERASED] == 1.0
    assert metrics[names.DROP_RATE_OTHERS] == 0.5
    assert metrics[names.DROP_BIAS] == 0.5


def test_a_rate_over_nothing_is_none():
    metrics = Drops(DropCounts()).add(taken([scored_group([0, 0])], []))
    assert metrics[names.DROP_RATE_ERASED] is None
    assert metrics[names.DROP_BIAS] is None


@pytest.mark.parametrize(("erasures", "warned"), [([2, 2, 2, 2], True), ([0, 0, 0, 0], False), ([0, 2, 0, 2], False)])
def test_a_run_says_so_if_what_erases_is_dropped_more_often(erasures: list[int], warned: bool):
    drops, watch = Drops(DropCounts()), Watch(WarningsConfig())
    told = []
    for step in range(1, 20):
        trained = [scored_group([0, 1, 0, 1]) for _ in range(4)]
        told += watch.check(step, drops.add(taken(trained, [scored_group(erasures)])))
    assert any("took something back were dropped as too old" in text for text in told) == warned
    # The counts are in checkpoints: a run that is resumed goes on to compare.
    resumed = Drops(DropCounts.model_validate_json(drops.counts.model_dump_json()))
    again, before = taken(trained, []), taken(trained, [])
    assert resumed.add(again) == drops.add(before)
