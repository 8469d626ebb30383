"""A NIC's loop: copies between memories of this process, host's or GPU's, that leave through the NIC and come back.

So one mechanism, the NIC's service levels, orders copies and messages of the model (paper §5). UCX chooses the way. To
or from a GPU it is the NIC's: of what else reaches a process's own memory (``self``, ``cuda_copy``, ``gdr_copy``)
nothing can report a failed peer, which NIXL insists on. Between host memories of a host without RDMA the kernel copies
(CMA).
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.transports.framed.frames import StreamClosed
from dualpath.transfer.transports.nixl.agent import Agent, Pieces, rest

DEADLINE_S = 10.0
"""Of one copy: ten thousand times what the largest Full Block takes."""

UCX_OPTIONS = "TLS=^tcp,POSIX_ERROR_HANDLING=y,SYSV_ERROR_HANDLING=y"
"""No port is opened, and where RDMA does not work nothing falls back to TCP. Without RDMA UCX meets itself in shared
memory, for which its peers there must be watched. UCX's variables in the environment come first."""

Copy = tuple[int, int, int]
"""Addresses of host memory and of device memory, and bytes."""
T = TypeVar("T")


class LoopError(Exception):
    """The loop has ended, or could not be made; it won't copy any more."""


class Loop:
    """Any thread may call. `copy` returns when the bytes are there, asleep meanwhile.

    When a copy fails or misses its deadline, the loop ends: its agent is destroyed, and every call raises LoopError.
    """

    def __init__(self, traffic_class: TrafficClass = TrafficClass.LOW, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._in_flight = 0
        self._why = ""
        self._lives_on = False
        try:
            self._agent: Agent | None = Agent(traffic_class, False, ucx_options=UCX_OPTIONS)
        except StreamClosed as error:
            raise LoopError(str(error)) from error
        self._agent.meet_itself()

    def register(self, address: int, n_bytes: int, device: int | None = None) -> int:
        """Memory of the host, or of GPU `device`, may be copied from now on. Returns a number for `deregister`."""
        return self._call(lambda agent: agent.register(address, n_bytes, device))

    def deregister(self, number: int) -> None:
        """The memory may be freed when this has returned: it waits for copies in flight.

        Raises LoopError also where an ended loop's agent lives on, and may touch the memory.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight)
            if self._agent is not None or self._lives_on:
                self._call(lambda agent: agent.deregister(number))

    def copy(self, to_device: bool, copies: Sequence[Copy], device: int | None = None) -> None:
        """Make all `copies`, at least one, in one transfer. `device` is None where its memory is the host's, too."""
        self.wait(self.submit(to_device, copies, device))

    def submit(self, to_device: bool, copies: Sequence[Copy], device: int | None = None) -> int:
        """Begin to `copy`. Returns a number for `wait`, which must follow."""
        table = np.array(copies, np.uint64)
        near, far = np.zeros((2, len(copies), 3), np.uint64)
        near[:, :2], far[:, :2], far[:, 2] = table[:, ::2], table[:, 1:], device or 0
        pieces = Pieces(near), Pieces(far, "DRAM" if device is None else "VRAM")
        with self._changed:
            number = self._call(lambda agent: agent.transfer(to_device, *pieces))
            self._in_flight += 1
        return number

    def wait(self, number: int) -> None:
        deadline_s = time.monotonic() + self._deadline_s
        try:
            while not self._call(lambda agent: agent.is_done(number)):
                if time.monotonic() > deadline_s:
                    raise self._ended(f"a copy was not done within {self._deadline_s:g} s")
                rest()
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Wait for copies in flight, and end. May be called twice."""
        with self._changed:
            self._changed.wait_for(lambda: not self._in_flight)
            self._ended("it is closed")

    def _call(self, work: Callable[[Agent], T]) -> T:
        with self._changed:
            if self._agent is None:
                raise LoopError(self._why)
            try:
                return work(self._agent)
            except StreamClosed as error:
                why = str(error)
            raise self._ended(why)

    def _ended(self, why: str) -> LoopError:
        """End the loop, unless it has ended. Returns the error that says so."""
        with self._changed:
            agent, self._agent = self._agent, None
            self._why = self._why or why
            if agent is not None and not agent.destroy():
                self._lives_on = True
                self._why += "; its agent lives on, and may touch memory until this process ends"
            return LoopError(self._why)
