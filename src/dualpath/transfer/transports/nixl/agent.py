"""An agent of NIXL's with its registered memory, and the proof that it is gone."""

import gc
import itertools
import logging
import os
import time
import uuid
import weakref
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from dualpath.core.traffic_classes import CLASSES
from dualpath.core.vocabulary import TrafficClass
from dualpath.spec.bounds import Count
from dualpath.transfer.pool import Bytes
from dualpath.transfer.transports.framed.frames import MAX_CHUNK_BYTES, StreamClosed

LIBRARIES = ("nixl_cu12", "nixl_cu13", "nixl_rocm")
"""Builds of NIXL; they differ in the GPUs whose memory they move. The package ``nixl`` would choose among them, for
which it imports torch."""
POLL_S = 50e-6
"""How long a thread sleeps before it looks again: NIXL tells nobody when a transfer is over. It costs a tenth of a core
while something is in flight, and a transfer a tenth of a millisecond."""

_CLASS = {
    traffic_class: f"IB_SL={marks.service_level},IB_TRAFFIC_CLASS={marks.tos}"
    for traffic_class, marks in CLASSES.items()
}
"""The service level on InfiniBand, and DSCP on RoCE. UCX marks no TCP packets."""


class Invitation(msgspec.Struct, frozen=True):
    """What a server tells a peer that has proved itself: its agent, and where in its memory the pool lies."""

    metadata: Annotated[bytes, msgspec.Meta(max_length=MAX_CHUNK_BYTES // 2)]
    pool_at: Count
    stride_bytes: Count


class Pieces(NamedTuple):
    """Memory of one kind, ``DRAM`` or ``VRAM``: `table` is ``[pieces, 3]``, address, bytes, device."""

    table: NDArray[np.uint64]
    kind: str = "DRAM"


class Agent:
    """Registers `n_bytes` of memory from the beginning of `memory`, which it keeps. One thread at a time may call.

    `is_loopback` keeps UCX from listening at other interfaces; `ucx_options` are more of its settings.

    Raises StreamClosed for every failure of NIXL's, which means that this agent is of no more use.
    """

    def __init__(
        self,
        traffic_class: TrafficClass,
        is_loopback: bool,
        memory: Bytes | None = None,
        n_bytes: int = 0,
        ucx_options: str = "",
    ) -> None:
        self._memory = memory
        self.memory_at = 0 if memory is None else memory.ctypes.data
        self._peer = ""
        self._numbers = itertools.count()
        self._handles: dict[int, Any] = {}
        """Of transfers under way. Each keeps the agent alive, so they are nowhere else."""
        options = [_CLASS[traffic_class], "NET_DEVICES=lo" if is_loopback else "", ucx_options]
        self._agent: Any = _make(",".join(filter(None, options)))
        self._registered: dict[int, Any] = {}
        if memory is not None:
            self.register(self.memory_at, n_bytes)

    def register(self, address: int, n_bytes: int, device: int | None = None) -> int:
        """Register memory of the host, or of a GPU. Returns a number for `deregister`."""
        number, kind = next(self._numbers), "DRAM" if device is None else "VRAM"
        self._registered[number] = self._call("register_memory", [(address, n_bytes, device or 0, "")], kind)
        return number

    def deregister(self, number: int) -> None:
        """Nothing may be under way to that memory or from it."""
        self._call("deregister_memory", self._registered.pop(number))

    def metadata(self) -> bytes:
        return bytes(self._call("get_agent_metadata"))

    def meet(self, metadata: bytes) -> None:
        """Transfers are to that agent from now on."""
        self._peer = self._call("add_remote_agent", metadata)

    def meet_itself(self) -> None:
        """Transfers are between this agent's own memories from now on."""
        self._peer = self._agent.name

    def post(self, is_write: bool, local_at: int, remote: list[tuple[int, int]]) -> int:
        """Copy between consecutive local bytes and `remote`'s (address, bytes). Returns a number for `is_done`."""
        sizes = np.array([n_bytes for _, n_bytes in remote], np.uint64)
        far = np.zeros((len(remote), 3), np.uint64)
        far[:, 0] = [address for address, _ in remote]
        far[:, 1] = sizes
        near = far.copy()
        near[:, 0] = np.uint64(local_at) + np.cumsum(sizes) - sizes
        return self.transfer(is_write, Pieces(near), Pieces(far))

    def transfer(self, is_write: bool, near: Pieces, far: Pieces) -> int:
        """Copy from each of our pieces to the peer's, or the other way. Returns a number for `is_done`."""
        lists = [self._call("get_xfer_descs", *pieces) for pieces in (near, far)]
        number = next(self._numbers)
        self._handles[number] = self._call("initialize_xfer", "WRITE" if is_write else "READ", *lists, self._peer)
        self._call("transfer", self._handles[number])
        return number

    def is_done(self, number: int) -> bool:
        """True, once, when all bytes have moved and the threads of either side can see them."""
        state = self._call("check_xfer_state", self._handles[number])
        if state == "PROC":
            return False
        if state != "DONE":
            raise StreamClosed("NIXL: a transfer failed")
        self._call("release_xfer_handle", self._handles.pop(number))
        return True

    def drive(self) -> None:
        """Do what peers have asked of us, where no NIC does it."""
        self._call("get_new_notifs")

    def destroy(self) -> bool:
        """End the agent. Returns True if it is gone, and with it everything that could move a byte of its memory.

        It closes UCX's sockets and queue pairs and takes back the registration, so what is on its way arrives nowhere.
        Only what a peer's kernel copies by itself (CMA, on one host) goes on: the peer must say that it has let go.
        """
        gone = weakref.ref(self._agent.agent)
        self._handles.clear()
        try:
            for number in list(self._registered):
                self.deregister(number)
        except StreamClosed as error:
            logging.getLogger(__name__).warning("an agent's memory stays registered until its end: %s", error)
        self._registered.clear()
        self._agent = None
        if gone() is not None:
            gc.collect()
        return gone() is None

    def _call(self, method: str, *arguments: Any) -> Any:
        """Returns what the method does. Nothing of an error outlives this call but words: it would keep the agent."""
        try:
            return getattr(self._agent, method)(*arguments)
        except Exception as error:  # NIXL's errors have no class in common
            why = f"NIXL: {type(error).__name__}: {error}"
        del arguments
        raise StreamClosed(why)


def installed_library() -> str | None:
    """Returns the build of NIXL that is here, without importing it, which takes a second."""
    return next(filter(find_spec, LIBRARIES), None)


def _make(ucx_options: str) -> Any:
    os.environ.setdefault("UCX_LOG_LEVEL", "error")  # it warns of every transfer that `destroy` cuts off,
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # and on standard output, as NIXL does
    library = import_module(f"{installed_library()}._api")
    log = logging.getLogger("nixl")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.WARNING)
    config = library.nixl_agent_config(enable_prog_thread=False, backends=[])  # its thread would never sleep
    try:
        agent = library.nixl_agent(uuid.uuid4().hex, config)
        agent.create_backend("UCX", {"engine_config": ucx_options})
    except Exception as error:  # NIXL's errors have no class in common
        raise StreamClosed(f"NIXL makes no agent: {type(error).__name__}: {error}") from error
    return agent


def rest() -> None:
    time.sleep(POLL_S)
