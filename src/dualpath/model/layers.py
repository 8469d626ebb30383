"""A ring of per-layer KV buffers, and the order in which the three threads of a layerwise prefill may use it.

Theory of operation. Every layer passes four stages: its hit KV is *loaded* (loader thread), the new tokens' KV is
*written* and then *attended* to (compute thread), and its KV is *shipped* (shipper thread). Shipping needs only the
written KV, so it runs in parallel with the layer's own attention. Layer `l` uses buffer ``l % slots`` and may start
loading once layer ``l − slots`` is both attended and shipped. With three slots, layer l+1 loads while l computes and
l−1 is shipped, and at most three layers' KV of the batch are on the device.

`LayerProgress` implements only that rule: four counters under one condition variable, deadlines for the compute
thread's waits, and an abort that ends all waits. `DeviceLayers` is the memory: on a CPU the I/O callbacks get views of
the buffers themselves, and nothing is copied; on an accelerator they get pinned staging memory, and `DeviceCopies` run
beside the compute stream. Both kinds of host memory come from a `HostMemory`.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualpath.kv.layout import KVLayout
from dualpath.model.device_copies import DeviceCopies, Piece, nothing_held

Bytes = NDArray[np.uint8]


class RunAbortedError(RuntimeError):
    """A wait ended because another thread of the same run failed; the cause is that thread's error."""


class LayerIOTimeoutError(TimeoutError):
    """An I/O callback did not return in time. It may still write into the buffers, so they are never used again."""


class LayerProgress:
    """How many layers have passed each stage of one run, and which thread may continue.

    The compute thread's waits have a deadline, which restarts at every step of any stage. The workers' waits end with
    the run, by `abort`.
    """

    def __init__(self, layers: int, slots: int, whole_context: bool, deadline_s: float) -> None:
        """`whole_context`: compute starts when all layers are loaded, and shipping when all are computed."""
        self.layers, self.slots, self.whole_context = layers, slots, whole_context
        self.peak_resident_layers = 0
        self.load_wait_ns = 0
        self.ship_wait_ns = 0
        self._deadline_s = deadline_s
        self._condition = threading.Condition()
        self._reached = dict.fromkeys(("loaded", "written", "attended", "shipped"), 0)
        self._failure: BaseException | None = None

    def wait_slot(self, layer: int) -> None:
        """Loader: wait until the buffer for `layer` is free."""
        self._wait(lambda: layer < self._freed() + self.slots, f"the buffer of layer {layer} to be free")
        with self._condition:
            self.peak_resident_layers = max(self.peak_resident_layers, layer + 1 - self._freed())

    def wait_loaded(self, layer: int) -> None:
        """Compute: wait until the hit KV of `layer` is on the device."""
        needed = self.layers if self.whole_context else layer + 1
        what = f"layer {needed - 1} to be loaded"
        self.load_wait_ns += self._wait(lambda: self._reached["loaded"] >= needed, what, self._deadline_s)

    def wait_written(self, layer: int) -> None:
        """Shipper: wait until the KV of `layer` is complete."""
        stage, needed = ("attended", self.layers) if self.whole_context else ("written", layer + 1)
        self._wait(lambda: self._reached[stage] >= needed, f"layer {needed - 1} to be computed")

    def wait_all_shipped(self) -> None:
        """Compute: wait until everything is shipped."""
        done = self.layers
        what = "the last layers to be shipped"
        self.ship_wait_ns += self._wait(lambda: self._reached["shipped"] == done, what, self._deadline_s)

    def advance(self, stage: str, layer: int) -> None:
        """`layer` has passed `stage`: loaded, written, attended or shipped. Layers pass every stage in order."""
        with self._condition:
            if self._reached[stage] != layer:
                raise AssertionError(f"layer {layer} is {stage} out of order: {self._reached[stage]} comes next")
            self._reached[stage] = layer + 1
            self._condition.notify_all()

    def abort(self, failure: BaseException) -> None:
        """End every wait, now and later, with RunAbortedError. The first failure is kept."""
        with self._condition:
            self._failure = self._failure or failure
            self._condition.notify_all()

    def _freed(self) -> int:
        return min(self._reached["attended"], self._reached["shipped"])

    def _wait(self, ready: Callable[[], bool], what: str, deadline_s: float | None = None) -> int:
        started_ns = time.perf_counter_ns()
        with self._condition:
            while self._failure is None and not ready():
                if not self._condition.wait(deadline_s):
                    raise LayerIOTimeoutError(f"no stage advanced for {deadline_s:g} s while waiting for {what}")
            if self._failure is not None:
                raise RunAbortedError(f"stopped while waiting for {what}") from self._failure
        return time.perf_counter_ns() - started_ns


class HostMemory(Protocol):
    """Where host memory of the layers comes from: that of another process too, so that it can move their KV."""

    def take(self, n_bytes: int) -> Bytes:
        """Returns `n_bytes`, aligned to a page, that are not in use. Raises OSError when memory is short."""
        ...

    def clear(self) -> None:
        """Nothing that was taken is used any more."""
        ...


class OwnMemory:
    """Host memory of this process."""

    def take(self, n_bytes: int) -> Bytes:
        return np.empty(n_bytes, np.uint8)

    def clear(self) -> None:
        """It goes with its last use."""


class DeviceLayers:
    """`slots` device buffers of rows, as wide as the layer's in each. They are kept between runs and grow."""

    def __init__(
        self,
        layout: KVLayout,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        memory: HostMemory,
        copies: DeviceCopies,
    ) -> None:
        self._layout, self._device, self._dtype, self._memory = layout, device, dtype, memory
        self._copies = copies
        self._let_go = nothing_held
        self._memory.clear()
        self._slots: list[Tensor] = [torch.empty(0)] * slots
        self._staging: dict[str, Tensor] = {}
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._marks: dict[tuple[str, int], torch.cuda.Event] = {}
        self._capacity_rows = 0
        if device.type == "cuda":
            self._streams = {way: torch.cuda.Stream(device) for way in ("load", "ship")}  # type: ignore[no-untyped-call]

    def reserve(self, rows: int, limit_rows: int) -> None:
        """Make every buffer at least `rows` long. They grow by doubling, up to `limit_rows`, so they seldom grow."""
        if rows <= self._capacity_rows:
            return
        self._capacity_rows = min(limit_rows, max(rows, 2 * self._capacity_rows))
        self._free()  # the old ones, before taking the new
        if self._streams:
            size = self._slot_bytes // self._dtype.itemsize
            self._slots = [torch.empty(size, dtype=self._dtype, device=self._device) for _ in self._slots]
            self._staging = {way: self._pinned(self._host_slot()) for way in self._streams}
            self._let_go = self._copies.hold(*self._slots, *self._staging.values())
        else:
            self._slots = [self._host_slot() for _ in self._slots]

    @property
    def _slot_bytes(self) -> int:
        return self._capacity_rows * max(self._layout.row_bytes)

    def _host_slot(self) -> Tensor:
        return torch.from_numpy(self._memory.take(self._slot_bytes)).view(self._dtype)

    def _pinned(self, slot: Tensor) -> Tensor:
        status = torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(status) != 0:
            raise RuntimeError(f"staging memory of {slot.nbytes} bytes can't be pinned: CUDA error {int(status)}")
        return slot

    def _unpin(self) -> None:
        for staged in self._staging.values():
            torch.cuda.cudart().cudaHostUnregister(staged.data_ptr())  # type: ignore[no-untyped-call]
        self._staging = {}

    def _free(self) -> None:
        self._let_go()
        self._let_go = nothing_held
        self._slots = [torch.empty(0)] * len(self._slots)
        self._unpin()
        self._memory.clear()

    def close(self) -> None:
        """Give the memory back; the object can't be used any more."""
        self._free()
        self._slots = []

    def rows(self, layer: int) -> Tensor:
        """The device buffer of `layer`: ``[rows, elements of a row]``."""
        return self._as_rows(layer, self._slots[layer % len(self._slots)])

    def _as_rows(self, layer: int, slot: Tensor) -> Tensor:
        elements = self._layout.row_bytes[layer] // self._dtype.itemsize
        return slot[: self._capacity_rows * elements].view(self._capacity_rows, elements)

    def destination(self, layer: int, first_row: int, rows: int) -> Bytes:
        """Returns host memory, `rows` rows of the layer, for a load to fill."""
        if self._streams:
            self._wait_mark("attended", layer - len(self._slots))
            return _as_bytes(self._as_rows(layer, self._staging["load"])[first_row : first_row + rows])
        return _as_bytes(self.rows(layer)[first_row : first_row + rows])

    def upload(self, layer: int, spans: list[tuple[int, int]]) -> None:
        """Copy loaded `spans` ``(first_row, rows)`` to the device. Returns when they are there."""
        if not self._streams:
            return
        self._copies.to_device(self._pieces(layer, "load", spans), self._streams["load"])

    def download(self, layer: int, spans: list[tuple[int, int]]) -> list[Bytes]:
        """Returns host bytes of `spans` of `layer`; on an accelerator they are valid until the next download."""
        if not self._streams:
            return [_as_bytes(self.rows(layer)[first : first + count]) for first, count in spans]
        self._wait_mark("written", layer)
        pieces = self._pieces(layer, "ship", spans)
        self._copies.to_host(pieces, self._streams["ship"])
        return [_as_bytes(staged) for _, staged in pieces]

    def _pieces(self, layer: int, way: str, spans: list[tuple[int, int]]) -> list[Piece]:
        rows, staging = self.rows(layer), self._as_rows(layer, self._staging[way])
        return [(rows[first : first + count], staging[first : first + count]) for first, count in spans]

    def mark(self, stage: str, layer: int) -> None:
        """Compute thread: record this point of the compute stream as the end of `stage` of `layer`."""
        if self._streams:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._marks[stage, layer] = event

    def _wait_mark(self, stage: str, layer: int) -> None:
        event = self._marks.get((stage, layer))
        if event is not None:
            event.synchronize()


def _as_bytes(rows: Tensor) -> Bytes:
    flat: Bytes = rows.view(torch.uint8).numpy().reshape(-1)
    return flat
