"""An engine's copies between host and device through its compute NIC, in the class of KV (paper §5)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dualpath.cluster.config import ClusterConfig
from dualpath.model import DeviceCopies, DeviceCopiesError, MemcpyCopies
from dualpath.model.device_copies import Piece
from dualpath.transfer.transports.nixl.loop import Loop, LoopError


def device_copies(cluster: ClusterConfig, device: torch.device) -> DeviceCopies:
    """Returns what ``--device-copies`` names."""
    return CnicCopies(device) if cluster.device_copies == "cnic" else MemcpyCopies()


class CnicCopies:
    """`DeviceCopies` by `Loop`. Scattered pieces are one thread's; any thread may copy others.

    The loop is made when memory is first held. So a prefill engine on a CPU never has one: its layers are in host
    memory, and nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = (device.index or 0) if device.type == "cuda" else None
        self._loop: Loop | None = None
        self._staging = torch.empty(0)
        self._staging_held: list[int] = []

    def hold(self, *memory: Tensor) -> Callable[[], None]:
        held = {number: one for one, number in zip(memory, self._register(*memory), strict=True)}

        def let_go() -> None:
            self._deregister(list(held))
            self._drop_staging()
            held.clear()  # not before: memory that is freed early would be written to all the same

        return let_go

    def _register(self, *memory: Tensor) -> list[int]:
        with _explained():
            loop = self._loop = self._loop or Loop()
            return [loop.register(one.data_ptr(), one.nbytes, self._gpu if one.is_cuda else None) for one in memory]

    def _deregister(self, held: list[int]) -> None:
        with _explained():
            for number in held:
                assert self._loop is not None
                self._loop.deregister(number)

    def _drop_staging(self) -> None:
        """The next scattered piece takes it anew."""
        self._deregister(self._staging_held)
        self._staging_held, self._staging = [], torch.empty(0)

    def to_device(self, pieces: Sequence[Piece], _stream: "torch.cuda.Stream | None" = None) -> None:
        near = self._contiguous(pieces)
        self._move(True, near, pieces)
        self._rearrange((device, copy) for (device, _), copy in zip(pieces, near, strict=True))

    def to_host(self, pieces: Sequence[Piece], _stream: "torch.cuda.Stream | None" = None) -> None:
        near = self._contiguous(pieces)
        self._rearrange((copy, device) for (device, _), copy in zip(pieces, near, strict=True))
        self._move(False, near, pieces)

    def _contiguous(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Returns what the NIC copies in place of each device tensor: itself, or as much of the staging block.

        A NIC would need a descriptor for every token of every head where decode memory keeps heads apart, 128 bytes
        each; so it copies whole Layer Blocks to or from the staging block, which the device rearranges at the speed of
        its own memory.
        """
        scattered = [device for device, _ in pieces if not device.is_contiguous()]
        if not scattered:
            return [device for device, _ in pieces]
        sizes = [one.numel() for one in scattered]
        parts = iter(torch.split(self._staged(sum(sizes), scattered[0].dtype), sizes))
        return [device if device.is_contiguous() else next(parts).view(device.shape) for device, _ in pieces]

    def _staged(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self._staging.numel() < elements or self._staging.dtype != dtype:
            self._drop_staging()
            self._staging = torch.empty(elements, dtype=dtype, device=self._device)
            self._staging_held = self._register(self._staging)
        return self._staging[:elements]

    def _rearrange(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Copy to the first of each pair from the second, unless it is the same, on the device. Waits for it."""
        moved = [to.copy_(source) for to, source in pairs if to is not source]
        if moved and self._gpu is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _move(self, to_device: bool, near: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        """One transfer, a descriptor a piece."""
        copies = [
            (host.data_ptr(), device.data_ptr(), host.nbytes)
            for device, (_, host) in zip(near, pieces, strict=True)
            if host.nbytes
        ]
        if not copies:
            return
        assert self._loop is not None, "memory is held before it is copied"
        with _explained():
            self._loop.copy(to_device, copies, self._gpu)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except LoopError as error:
        raise DeviceCopiesError(
            f"--device-copies cnic: {error}; --device-copies memcpy copies without the NIC"
        ) from error
