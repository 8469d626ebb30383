"""Chunk plans: the paper's two paths, later chunks, and exact partitions for any legs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.load_plan import ChunkPlan, Segment, TokenRange, chunk_plan
from dualpath.core.vocabulary import Leg, Side

PE_LEG, DE_LEG = (Leg(Side.PE, 0, 4),), (Leg(Side.DE, 0, 4),)


def test_pe_path_ships_hit_and_miss() -> None:
    assert chunk_plan(PE_LEG, 256, 256, 50) == ChunkPlan(256, (Segment(Side.PE, 0, 256),), (TokenRange(0, 306),))


def test_de_path_ships_miss_only() -> None:
    assert chunk_plan(DE_LEG, 256, 256, 50) == ChunkPlan(256, (Segment(Side.DE, 0, 256),), (TokenRange(256, 50),))


def test_nothing_hit_nothing_loaded() -> None:
    assert chunk_plan((), 0, 0, 50) == ChunkPlan(0, (), (TokenRange(0, 50),))


def test_later_chunks_load_what_earlier_ones_computed_from_the_de_buffer() -> None:
    assert chunk_plan(PE_LEG, 256, 300, 10) == ChunkPlan(
        300, (Segment(Side.PE, 0, 256), Segment(Side.DE, 256, 44)), (TokenRange(300, 10),)
    )
    assert chunk_plan(DE_LEG, 256, 300, 10) == ChunkPlan(300, (Segment(Side.DE, 0, 300),), (TokenRange(300, 10),))
    assert chunk_plan((), 0, 30, 10) == ChunkPlan(30, (Segment(Side.DE, 0, 30),), (TokenRange(30, 10),))


def test_a_split_ships_the_pe_part_and_the_miss() -> None:
    split = (Leg(Side.PE, 0, 1), Leg(Side.DE, 1, 3))
    assert chunk_plan(split, 256, 256, 5) == ChunkPlan(
        256, (Segment(Side.PE, 0, 64), Segment(Side.DE, 64, 192)), (TokenRange(0, 64), TokenRange(256, 5))
    )
    other_way = (Leg(Side.PE, 3, 1), Leg(Side.DE, 0, 3))
    assert chunk_plan(other_way, 256, 256, 5).ships == (TokenRange(192, 69),)


def test_a_window_loads_and_ships_of_the_hit_only_what_it_sees() -> None:
    """With a window of 100, the token at 256 sees from 157 on. New tokens are shipped whole, for storage."""
    split = chunk_plan((Leg(Side.PE, 0, 3), Leg(Side.DE, 3, 1)), 256, 256, 5)
    assert split.within(100) == ChunkPlan(
        256, (Segment(Side.PE, 157, 35), Segment(Side.DE, 192, 64)), (TokenRange(157, 35), TokenRange(256, 5))
    )
    assert split.within(1) == ChunkPlan(256, (), (TokenRange(256, 5),))
    assert split.within(257) == split.within(None) == split
    pe_path = chunk_plan(PE_LEG, 256, 256, 500).within(10)
    assert pe_path == ChunkPlan(256, (Segment(Side.PE, 247, 9),), (TokenRange(247, 509),))
    later = chunk_plan(PE_LEG, 256, 300, 10).within(50)
    assert later == ChunkPlan(300, (Segment(Side.PE, 251, 5), Segment(Side.DE, 256, 44)), (TokenRange(300, 10),))


@pytest.mark.parametrize(
    ("legs", "hit", "cached", "new"),
    [
        (PE_LEG, 256, 255, 5),  # starts inside the hit
        (PE_LEG, 256, 256, 0),  # empty
        (PE_LEG, 320, 320, 5),  # a block short
        ((), 64, 64, 5),
        ((Leg(Side.PE, 1, 4),), 256, 256, 5),  # a gap at the start
        ((Leg(Side.PE, 0, 2), Leg(Side.DE, 1, 3)), 256, 256, 5),  # overlap
        ((Leg(Side.PE, 0, 4), Leg(Side.DE, 4, 0)), 256, 256, 5),  # an empty leg
    ],
)
def test_plans_that_can_not_be(legs: tuple[Leg, ...], hit: int, cached: int, new: int) -> None:
    with pytest.raises(ValueError, match=r"chunk of|do not tile"):
        chunk_plan(legs, hit, cached, new)


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(Side), st.integers(1, 5)), max_size=5),
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_every_position_is_loaded_once_and_shipped_once(
    sides: list[tuple[Side, int]], chunks: list[int], order: object
) -> None:
    legs, block = [], 0
    source: list[Side] = []
    for side, blocks in sides:
        legs.append(Leg(side, block, blocks))
        block += blocks
        source += [side] * (64 * blocks)
    order.shuffle(legs)  # type: ignore[attr-defined]
    hit = cached = 64 * block
    in_de_buffer = [side is Side.DE for side in source]
    for new in chunks:
        plan = chunk_plan(tuple(legs), hit, cached, new)
        loaded = [side for part in plan.loads for side in [part.side] * part.tokens]
        assert loaded == source + [Side.DE] * (cached - hit)
        assert [part.first_token for part in plan.loads] == [
            sum(part.tokens for part in plan.loads[:i]) for i in range(len(plan.loads))
        ]
        assert all(a.side is not b.side for a, b in zip(plan.loads, plan.loads[1:], strict=False))
        in_de_buffer += [False] * new
        for part in plan.ships:
            for position in range(part.first_token, part.first_token + part.tokens):
                assert not in_de_buffer[position], "shipped twice, or shipped back"
                in_de_buffer[position] = True
        cached += new
        assert all(in_de_buffer[:cached])
