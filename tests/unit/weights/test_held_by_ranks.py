"""What ranks of tensor parallelism hold together is what one rank alone would."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from common.weights import held_by_ranks, held_sum


@given(
    parts=st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=6),
    ranks=st.integers(1, 4),
    zeros=st.booleans(),
    seed=st.integers(0, 100),
)
def test_shares_are_added_and_copies_count_once(
    parts: list[tuple[int, bool]], ranks: int, zeros: bool, seed: int
) -> None:
    """`parts`: rows of a share, and whether the part is divided or on every rank."""
    generator = torch.Generator().manual_seed(seed)
    model: list[torch.Tensor] = []
    held: list[list[int]] = [[] for _ in range(ranks)]
    for rows, divided in parts:
        whole = torch.zeros(rows * ranks, 3) if zeros else torch.randn(rows * ranks, 3, generator=generator)
        model.append(whole)
        shares = whole.chunk(ranks) if divided else [whole] * ranks
        for rank, share in zip(held, shares, strict=True):
            rank.append(held_sum([share]))
    assert held_by_ranks(held) == held_sum(model)
