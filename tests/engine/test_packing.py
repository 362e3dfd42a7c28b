"""A pack shows every token exactly its own sequence, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fourscore.engine.packing import packs

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=9)  # few different tokens: many shared beginnings


@given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 20))
def test_every_token_sees_its_own_sequence_and_nothing_else(sequences: list[list[int]], budget: int) -> None:
    met: list[int] = []
    for pack in packs(sequences, budget):
        visible = pack.visible()
        met += pack.members
        for member, path in zip(pack.members, pack.paths, strict=True):
            assert [pack.ids[place] for place in path] == sequences[member]
            assert [pack.positions[place] for place in path] == list(range(len(path)))
            for n, place in enumerate(path):
                assert visible[place].nonzero().flatten().tolist() == path[: n + 1]
        beginnings = {tuple(sequences[m][:n]) for m in pack.members for n in range(1, len(sequences[m]) + 1)}
        assert len(pack.ids) == len(beginnings)  # what is shared stands once
    assert sorted(met) == list(range(len(sequences)))


def test_choices_stay_with_a_context_longer_than_the_budget() -> None:
    context = list(range(100))
    (pack,) = packs([[*context, 7], [*context, 8], [*context, 9]], budget=50)
    assert len(pack.ids) == 103


def test_no_pack_of_several_is_above_the_most_that_a_network_takes() -> None:
    context = list(range(20))
    sizes = [len(pack.ids) for pack in packs([[*context, n, n] for n in range(100, 110)], budget=20, most=30)]
    assert max(sizes) <= 30
    assert len(sizes) == 2


def test_a_new_pack_begins_at_the_budget() -> None:
    sizes = [len(pack.ids) for pack in packs([[i] * 10 for i in range(7)], budget=30)]
    assert sizes == [30, 30, 10]
