"""Device blocks: never lost, never given twice, in as few runs as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.model import OutOfBlocksError
from dualpath.model.paged import BlockAllocator, Extent


def blocks_of(extents: tuple[Extent, ...]) -> list[int]:
    return [b for e in extents for b in range(e.first_block, e.first_block + e.blocks)]


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 1000)), max_size=60),
)
def test_blocks_are_conserved(blocks: int, actions: list[tuple[bool, int, int]]) -> None:
    allocator = BlockAllocator(blocks)
    held: list[tuple[Extent, ...]] = []
    for takes, count, choice in actions:
        if not takes and held:
            allocator.give_back(held.pop(choice % len(held)))
        elif count <= allocator.free_blocks:
            before = allocator.free_blocks
            longest = _longest_free_run(blocks, held)
            extents = allocator.take(count)
            assert sum(e.blocks for e in extents) == count == before - allocator.free_blocks
            assert (len(extents) == 1) == (count <= longest)
            held.append(extents)
        else:
            with pytest.raises(OutOfBlocksError):
                allocator.take(count)
        taken = [b for extents in held for b in blocks_of(extents)]
        assert len(taken) == len(set(taken)) == blocks - allocator.free_blocks
        assert set(taken) <= set(range(blocks))
    for extents in held:
        allocator.give_back(extents)
    assert allocator.take(blocks) == (Extent(0, blocks),)


def _longest_free_run(blocks: int, held: list[tuple[Extent, ...]]) -> int:
    taken = {b for extents in held for b in blocks_of(extents)}
    longest = run = 0
    for block in range(blocks):
        run = 0 if block in taken else run + 1
        longest = max(longest, run)
    return longest


def test_the_smallest_run_that_fits_is_used_else_the_largest_first() -> None:
    allocator = BlockAllocator(20)
    a, b, c, d = (allocator.take(n) for n in (3, 1, 6, 1))
    assert (a, b, c, d) == ((Extent(0, 3),), (Extent(3, 1),), (Extent(4, 6),), (Extent(10, 1),))
    allocator.give_back(a)
    allocator.give_back(c)  # free: 0-2, 4-9, 11-19
    assert allocator.take(3) == (Extent(0, 3),)
    assert allocator.take(12) == (Extent(11, 9), Extent(4, 3))


def test_wrong_use_is_refused() -> None:
    allocator = BlockAllocator(4)
    extents = allocator.take(2)
    with pytest.raises(OutOfBlocksError, match="3 blocks asked for, 2 of 4 are free"):
        allocator.take(3)
    with pytest.raises(ValueError, match="at least one"):
        allocator.take(0)
    allocator.give_back(extents)
    for wrong in (Extent(0, 1), Extent(3, 2), Extent(-1, 1)):
        with pytest.raises(ValueError, match="given back twice"):
            allocator.give_back((wrong,))
    with pytest.raises(ValueError, match="not 0"):
        BlockAllocator(0)
