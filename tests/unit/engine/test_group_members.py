"""A group is over when nothing more of it comes, whatever happens to its responses and in which order."""

from contextlib import ExitStack, suppress

from hypothesis import given
from hypothesis import strategies as st

from rollout_server.engine import group_members
from rollout_server.engine.group_members import GroupMembers

MOVES = st.tuples(st.sampled_from(["begin", "finish", "fail", "take"]), st.sampled_from("abc"))


class Left(Exception):
    """What ends a response early."""


def fail(response: ExitStack) -> None:
    with suppress(Left), response:
        raise Left


@given(st.lists(MOVES, max_size=30))
def test_every_incomplete_group_is_over_once_it_has_nothing_under_way(moves: list[tuple[str, str]]) -> None:
    members = GroupMembers()
    under_way: dict[str, list[ExitStack]] = {"a": [], "b": [], "c": []}
    incomplete: set[str] = set()
    expected: set[str] = set()
    for move, group in moves:
        if move == "begin":
            response = ExitStack()
            response.enter_context(members.member(group))
            under_way[group].append(response)
        elif move == "take":
            idle = {name for name in expected if not under_way[name]}
            assert set(members.take_over()) == idle
            expected.clear()
        elif under_way[group]:
            response = under_way[group].pop(0)
            if move == "fail":
                fail(response)
                incomplete.add(group)
            else:
                response.close()
            if not under_way[group] and group in incomplete:
                expected.add(group)
    members.put_back(["d"])
    assert set(members.take_over()) == {name for name in expected if not under_way[name]} | {"d"}


def test_groups_that_lost_a_response_long_ago_are_forgotten() -> None:
    members = GroupMembers()
    for number in range(group_members.REMEMBERED + 5):
        response = ExitStack()
        response.enter_context(members.member(str(number)))
        fail(response)
    assert len(members.take_over()) == group_members.REMEMBERED + 5
    for number in (0, group_members.REMEMBERED + 4):
        with members.member(str(number)):
            pass
    assert members.take_over() == [str(group_members.REMEMBERED + 4)]
