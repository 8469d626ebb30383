"""What an operator orders of an engine, beside requests: other weights, device memory given back and taken again.

The coordinator sees to it that nothing is in flight where an order needs that. Reading new weights is on a thread of
its own, so that the engine serves meanwhile; everything else is on the compute thread, between two batches.
"""

import asyncio
import ctypes
import gc
from concurrent.futures import Executor
from typing import Protocol

import torch

from dualpath.cluster import orders as o
from dualpath.cluster.engines.host import EngineHost
from dualpath.model import LoadedModel, NewWeights, read_weights, release_weights, restore_weights, use_weights
from dualpath.thread_names import named_threads


class Worker(Protocol):
    """A prefill or decode worker, as far as its device memory goes."""

    def release_memory(self) -> None: ...

    def restore_memory(self) -> None: ...


class EngineOrders:
    """Carries out orders and answers each with `OrderDone`. Used from the main thread."""

    def __init__(self, host: EngineHost, model: LoadedModel, worker: Worker) -> None:
        self._host = host
        self._model = model
        self._worker = worker
        self._new: NewWeights | None = None
        self._reading = named_threads(1, "weights")

    def handle(self, message: o.EngineOrder) -> None:
        reads = isinstance(message, o.ReadWeights | o.DropWeights)  # in this order, also when a read is given up
        self._host.spawn(self._carry_out(message, self._reading if reads else self._host.compute))

    async def _carry_out(self, message: o.EngineOrder, thread: Executor) -> None:
        try:
            fingerprint = await asyncio.get_running_loop().run_in_executor(thread, self._work, message)
        except Exception as error:
            self._host.send(o.OrderDone(message.order, error=f"{type(error).__name__}: {error}"))
            if isinstance(message, o.UseWeights | o.RestoreMemory):
                # It may have weights that are half new, or none. Only an engine that is gone can't serve them.
                self._host.leave(f"internal error: {type(message).__name__} failed: {error!r}")
        else:
            self._host.send(o.OrderDone(message.order, fingerprint=fingerprint))

    def _work(self, message: o.EngineOrder) -> str:
        """Returns the fingerprint of weights that were read."""
        served = self._host.config.cluster.model
        match message:
            case o.ReadWeights():
                self._new = None  # never three copies
                self._new = read_weights(self._model, served, message.path)
                return self._new.fingerprint
            case o.UseWeights():
                if self._new is None:
                    raise RuntimeError("no weights have been read")
                use_weights(self._model, self._new)
                self._new = None
            case o.DropWeights():
                self._new = None
            case o.ReleaseMemory():
                self._release(message)
            case o.RestoreMemory():
                fingerprint = restore_weights(self._model, served, message.path) if message.weights else ""
                if message.kv:
                    self._worker.restore_memory()
                return fingerprint
        return ""

    def _release(self, message: o.ReleaseMemory) -> None:
        if message.kv:
            self._worker.release_memory()
        if message.weights:
            release_weights(self._model, message.keep)
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        elif hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
            libc.malloc_trim(0)

    def close(self) -> None:
        self._reading.shutdown(wait=False, cancel_futures=True)
