"""How KV is copied between host memory and the device: the seam at which an engine has its NIC do it (paper §5)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Piece = tuple[Tensor, Tensor]
"""On the device and on the host, of one shape and type. The host's is contiguous; the device's may lie scattered."""


class DeviceCopiesError(RuntimeError):
    """Copies can't go on. One that was under way may still touch its memory: only the end of this process ends that."""


class DeviceCopies(Protocol):
    """Copies that are over when the call returns. Raises DeviceCopiesError.

    A CUDA device is done with what is copied, but for work on the caller's current stream."""

    def hold(self, *memory: Tensor) -> Callable[[], None]:
        """Pieces may be parts of `memory` until the result is called, which waits for copies and comes before the
        memory is freed."""
        ...

    def to_device(self, pieces: Sequence[Piece], stream: "torch.cuda.Stream | None" = None) -> None:
        """Copy each piece to the device. A `stream` is for such copies alone; host memory is pinned then."""
        ...

    def to_host(self, pieces: Sequence[Piece], stream: "torch.cuda.Stream | None" = None) -> None:
        """Copy each piece to the host, likewise."""
        ...


class MemcpyCopies:
    """`DeviceCopies` by torch: ``memcpy`` on a CPU, ``cudaMemcpyAsync`` on CUDA."""

    def hold(self, *_memory: Tensor) -> Callable[[], None]:
        return nothing_held

    def to_device(self, pieces: Sequence[Piece], stream: "torch.cuda.Stream | None" = None) -> None:
        _copy(pieces, stream)

    def to_host(self, pieces: Sequence[Piece], stream: "torch.cuda.Stream | None" = None) -> None:
        _copy([(host, device) for device, host in pieces], stream)


def nothing_held() -> None:
    """What `hold` returns when there is nothing to do."""


def _copy(pairs: Iterable[tuple[Tensor, Tensor]], stream: "torch.cuda.Stream | None") -> None:
    """Copy to the first of each pair from the second."""
    if stream is None:
        for to, source in pairs:
            to.copy_(source)
        return
    with torch.cuda.stream(stream):
        for to, source in pairs:
            to.copy_(source, non_blocking=True)
    stream.synchronize()
