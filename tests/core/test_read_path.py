"""Path choice: each way by example, and what holds for all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.policy import PolicyError
from dualpath.core.read_path import MIN_SPLIT_BLOCKS, READ_PATHS, PathFacts, ReadPath, choose_legs, find_read_path
from dualpath.core.vocabulary import Leg, Side
from dualpath.spec.registry import UnknownNameError


def legs(name: str, blocks: int, pe: int = 0, de: int = 0, *, buffer: int = 1_000, turn: int = 0) -> tuple[Leg, ...]:
    return choose_legs(find_read_path(name), PathFacts(blocks, pe, de, buffer, turn))


def test_basic_reads_on_the_pe_side_whatever_the_queues() -> None:
    assert legs("pe_only", 10, pe=9_999) == (Leg(Side.PE, 0, 10),)


def test_de_only_reads_on_the_de_side_whatever_the_queues() -> None:
    assert legs("de_only", 10, de=9_999) == (Leg(Side.DE, 0, 10),)


@pytest.mark.parametrize(("pe", "de", "side"), [(100, 200, Side.PE), (200, 100, Side.DE), (100, 100, Side.PE)])
def test_the_shorter_queue_reads_and_a_tie_goes_to_the_pe(pe: int, de: int, side: Side) -> None:
    assert legs("shorter_queue", 10, pe, de) == (Leg(side, 0, 10),)


def test_a_leg_that_the_pe_buffer_could_never_hold_goes_to_the_de() -> None:
    assert legs("shorter_queue", 10, pe=0, de=500, buffer=9) == (Leg(Side.DE, 0, 10),)
    assert legs("alternate", 10, buffer=9) == (Leg(Side.DE, 0, 10),)


def test_alternate_gives_each_side_one_of_every_two() -> None:
    sides = [legs("alternate", 1, turn=turn)[0].side for turn in range(1_024)]
    assert all(sides[turn] is not sides[turn + 1] for turn in range(0, 1_024, 2))


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 6, 8, 13, 16, 96, 384, 768])
def test_alternate_is_not_in_step_with_a_round_robin(stride: int) -> None:
    for first in range(0, stride, 1 + stride // 16):
        sides = [legs("alternate", 1, turn=turn)[0].side for turn in range(first, 600 * stride, stride)]
        assert 0.43 < sides.count(Side.PE) / len(sides) < 0.57


def test_split_lets_both_queues_end_together() -> None:
    assert legs("split", 20) == (Leg(Side.PE, 0, 10), Leg(Side.DE, 10, 10))
    assert legs("split", 20, pe=4 * 64) == (Leg(Side.PE, 0, 8), Leg(Side.DE, 8, 12))
    assert legs("split", 20, de=4 * 64) == (Leg(Side.PE, 0, 12), Leg(Side.DE, 12, 8))


def test_split_goes_one_way_when_one_queue_is_much_longer() -> None:
    assert legs("split", 20, pe=20 * 64) == (Leg(Side.DE, 0, 20),)
    assert legs("split", 20, de=20 * 64) == (Leg(Side.PE, 0, 20),)


def test_split_makes_no_tiny_legs() -> None:
    assert legs("split", MIN_SPLIT_BLOCKS) == (Leg(Side.PE, 0, MIN_SPLIT_BLOCKS),)
    assert legs("split", 20, pe=14 * 64) == (Leg(Side.DE, 0, 20),)
    assert legs("split", 20, de=14 * 64) == (Leg(Side.PE, 0, 20),)


def test_split_fills_a_small_pe_buffer_and_leaves_the_rest_to_the_de() -> None:
    assert legs("split", 20, buffer=6) == (Leg(Side.PE, 0, 6), Leg(Side.DE, 6, 14))
    assert legs("split", 20, de=9_999, buffer=18) == (Leg(Side.DE, 0, 20),)


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(READ_PATHS.names()),
    st.integers(1, 2_000),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(1, 2_000),
    st.integers(0, 1_000),
)
def test_legs_tile_the_hit_in_order_and_fit(
    read_path: str, blocks: int, pe: int, de: int, buffer: int, turn: int
) -> None:
    found = legs(read_path, blocks, pe, de, buffer=buffer, turn=turn)
    assert [leg.first_block for leg in found] == [sum(leg.blocks for leg in found[:i]) for i in range(len(found))]
    assert sum(leg.blocks for leg in found) == blocks
    assert all(leg.blocks > 0 for leg in found)
    assert len({leg.side for leg in found}) == len(found)
    if read_path != "pe_only":
        assert all(leg.blocks <= buffer for leg in found if leg.side is Side.PE)


@settings(deadline=None, derandomize=True)
@given(st.integers(2 * MIN_SPLIT_BLOCKS, 2_000), st.integers(0, 10**5), st.integers(0, 10**5))
def test_split_queues_end_within_a_block_of_each_other(blocks: int, pe: int, de: int) -> None:
    found = legs("split", blocks, pe, de, buffer=10**6)
    if len(found) == 2:
        assert abs((pe + 64 * found[0].blocks) - (de + 64 * found[1].blocks)) <= 64


def a_third(facts: PathFacts) -> int:
    return facts.hit_blocks // 3


def test_a_function_elsewhere_is_a_read_path_of_both_sides() -> None:
    assert find_read_path(f"{__name__}:a_third") == ReadPath(a_third, "both")
    assert legs(f"{__name__}:a_third", 9) == (Leg(Side.PE, 0, 3), Leg(Side.DE, 3, 6))


@pytest.mark.parametrize("blocks", [-1, 10, 0.5, None])
def test_a_rule_that_decides_what_cannot_be_is_named(blocks: object) -> None:
    def rule(_: PathFacts) -> object:
        return blocks

    with pytest.raises(PolicyError, match=rf"rule gives the PE {blocks!r} of 9 hit blocks"):
        choose_legs(ReadPath(rule), PathFacts(9, 0, 0, 100, 0))  # type: ignore[arg-type]


NO_RULE = 42


def test_what_is_no_function_is_no_read_path() -> None:
    with pytest.raises(UnknownNameError, match="is 42, which is no function"):
        find_read_path(f"{__name__}:NO_RULE")
