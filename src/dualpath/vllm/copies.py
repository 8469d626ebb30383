"""Copies between a worker's device blocks and the pages of its engine's buffer, in whole Layer Blocks.

A worker's part of a Layer Block is one run of bytes: `device_blocks` of it in a row, each `[heads][tokens][K‖V]` of the
heads that it has. A page holds the parts of all workers, rank after rank, layer after layer.
"""

from collections.abc import Callable, Sequence

import msgspec
import torch

from dualpath.kv.layout import KVLayout
from dualpath.transfer.pool import MappedPages


class WorkerPart(msgspec.Struct, frozen=True):
    """Where a worker's bytes are in each Layer Block of a page."""

    layout: KVLayout
    block_size: int
    """Tokens of a device block."""
    device_block_bytes: int
    """Of one layer, at this worker."""
    offset_bytes: int
    writes: bool = True
    """False where all workers have the same KV and another one writes it."""

    @property
    def ratio(self) -> int:
        """Device blocks in a block."""
        return self.layout.block_tokens // self.block_size


class Copies:
    """Copies on the CPU: each is done when its method returns. `CudaCopies` has the same methods for a GPU."""

    def __init__(self, part: WorkerPart, layers: Sequence[torch.Tensor]) -> None:
        """`layers` have one row of bytes for each device block, uint8, over vLLM's own memory."""
        self.part = part
        self.layers = list(layers)

    def to_device(self, pages: MappedPages, page: int, layer: int, device_blocks: Sequence[int], skip: int = 0) -> None:
        """Copy a layer of a page into device blocks, but for the block's first `skip` ones."""
        for row, piece in self._pieces(pages, page, layer, device_blocks, skip):
            row.copy_(piece, non_blocking=True)

    def to_page(self, pages: MappedPages, page: int, layer: int, device_blocks: Sequence[int]) -> None:
        if self.part.writes:
            for row, piece in self._pieces(pages, page, layer, device_blocks, 0):
                piece.copy_(row, non_blocking=True)

    def _pieces(
        self, pages: MappedPages, page: int, layer: int, device_blocks: Sequence[int], skip: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        part, rows = self.part, self.layers[layer]
        whole = torch.from_numpy(pages.view(page))
        start, n_bytes = part.layout.layer_range(layer)[0] + part.offset_bytes, part.device_block_bytes
        return [
            (rows[device_block], whole[start + index * n_bytes : start + (index + 1) * n_bytes])
            for index, device_block in enumerate(device_blocks)
            if index >= skip
        ]

    def follow(self) -> None:
        """Copies from here on see what the model's work up to here has written."""

    def lead(self) -> None:
        """The model's work from here on sees the copies up to here."""

    def done(self) -> Callable[[], bool]:
        """Returns a function that tells whether the copies up to here are done."""
        return lambda: True

    def settle(self) -> None:
        """Return once all copies are done."""


class CudaCopies(Copies):
    """Copies on a stream beside the model's. Not run yet: no GPU was at hand.

    Copies to and from pages that are not pinned are done when their method returns; the order is right either way.
    """

    def __init__(self, part: WorkerPart, layers: Sequence[torch.Tensor]) -> None:
        super().__init__(part, layers)
        self._device = layers[0].device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def to_device(self, pages: MappedPages, page: int, layer: int, device_blocks: Sequence[int], skip: int = 0) -> None:
        with torch.cuda.stream(self._stream):
            super().to_device(pages, page, layer, device_blocks, skip)

    def to_page(self, pages: MappedPages, page: int, layer: int, device_blocks: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream):
            super().to_page(pages, page, layer, device_blocks)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def done(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.query

    def settle(self) -> None:
        self._stream.synchronize()


def copies_for(part: WorkerPart, layers: Sequence[torch.Tensor]) -> Copies:
    """Raises ValueError for a device whose order of copies is not known here."""
    kinds = {"cpu": Copies, "cuda": CudaCopies}
    device = layers[0].device.type
    if device not in kinds:
        raise ValueError(f"DualPathConnector: KV on a {device} device is not supported; use {' or '.join(kinds)}")
    return kinds[device](part, layers)
