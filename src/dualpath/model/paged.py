"""Device memory of a decode engine: KV in blocks of 64 tokens, allocated in runs that are as long as possible.

A sequence's blocks form a short list of *extents*, runs of consecutive blocks. Attention reads an extent as one view,
so fewer extents mean fewer and larger reads. Any free blocks can be used: fragmentation costs speed, not capacity.
"""

import bisect

import msgspec


class OutOfBlocksError(RuntimeError):
    """Fewer blocks are free than requested; nothing was taken."""


class Extent(msgspec.Struct, frozen=True, gc=False):
    """Consecutive device blocks."""

    first_block: int
    blocks: int


class BlockAllocator:
    """The free runs of ``0 … blocks − 1``, in order; adjacent runs are joined. Not thread-safe: its owner locks."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"a decode engine needs at least one block of device memory, not {blocks}")
        self.blocks = blocks
        self._runs: list[list[int]] = [[0, blocks]]

    @property
    def free_blocks(self) -> int:
        return sum(count for _, count in self._runs)

    def take(self, blocks: int) -> tuple[Extent, ...]:
        """Take the smallest free run that holds `blocks`, else the largest runs first. Raises OutOfBlocksError."""
        if blocks < 1:
            raise ValueError(f"asked for {blocks} blocks; at least one is needed")
        if blocks > self.free_blocks:
            raise OutOfBlocksError(f"{blocks} blocks asked for, {self.free_blocks} of {self.blocks} are free")
        taken: list[Extent] = []
        while blocks:
            fitting = [run for run in self._runs if run[1] >= blocks]
            run = min(fitting, key=lambda r: r[1]) if fitting else max(self._runs, key=lambda r: r[1])
            count = min(blocks, run[1])
            taken.append(Extent(run[0], count))
            run[0], run[1] = run[0] + count, run[1] - count
            self._runs = [r for r in self._runs if r[1]]
            blocks -= count
        return tuple(taken)

    def give_back(self, extents: tuple[Extent, ...]) -> None:
        """Free what `take` returned. Raises ValueError for a block that is free already or does not exist."""
        for extent in extents:
            self._insert(extent.first_block, extent.blocks)

    def _insert(self, first: int, count: int) -> None:
        at = bisect.bisect_left(self._runs, [first, 0])
        before = self._runs[at - 1] if at else None
        after = self._runs[at] if at < len(self._runs) else None
        if (
            first < 0
            or first + count > self.blocks
            or (before and sum(before) > first)
            or (after and first + count > after[0])
        ):
            raise ValueError(f"blocks {first} … {first + count - 1} are not all taken: given back twice?")
        if after and first + count == after[0]:
            count += after[1]
            del self._runs[at]
        if before and sum(before) == first:
            before[1] += count
        else:
            self._runs.insert(at, [first, count])
