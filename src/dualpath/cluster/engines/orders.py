"""What an operator orders of an engine, beside requests: other weights, device memory given back and taken again.

The coordinator sees to it that nothing is in flight where an order needs that. Reading new weights is on a thread of
its own, so that the engine serves meanwhile; everything else is on the compute thread, between two batches.
"""

import gc
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import torch

from dualpath.cluster import orders as o
from dualpath.cluster.attachment import CarryOut, Reply
from dualpath.model import LoadedModel, NewWeights, read_weights, release_weights, restore_weights, use_weights
from dualpath.model.allocator import giving_memory_back
from dualpath.thread_names import named_threads


class Worker(Protocol):
    """What computes for a prefill or decode engine, as far as its device memory goes."""

    def release_memory(self) -> None: ...

    def restore_memory(self) -> None: ...


class EngineOrders:
    """Carries out orders and answers each with `OrderDone`."""

    def __init__(self, served: str, model: LoadedModel, worker: Worker, compute: Executor) -> None:
        """`served` is the path of the checkpoint."""
        self._served = served
        self._model = model
        self._worker = worker
        self._compute = compute
        self._new: NewWeights | None = None
        self._reading = named_threads(1, "weights")
        self.fingerprint = ""
        """Of the weights taken into use since the start; empty when they are still those of the start."""
        self.asleep = False
        """Whether memory has been given away, so that only who took it can wake this engine."""

    def carry_out(self, call: CarryOut, answer: Callable[[Reply], None], leave: Callable[[str], None]) -> None:
        """Start to; `answer` gets the reply, and `leave` why this engine can't go on, on another thread."""
        reads = isinstance(call.order, o.ReadWeights | o.DropWeights)  # in this order, also when a read is given up
        (self._reading if reads else self._compute).submit(self._carry_out, call, answer, leave)

    def _carry_out(self, call: CarryOut, answer: Callable[[Reply], None], leave: Callable[[str], None]) -> None:
        order = call.order
        try:
            fingerprint = self._work(order)
        except Exception as error:
            done = o.OrderDone(order.order, error=f"{type(error).__name__}: {error}")
            answer(Reply(call.call, order_done=done))
            if isinstance(order, o.UseWeights | o.RestoreMemory):
                # It may have weights that are half new, or none. Only an engine that is gone can't serve them.
                leave(f"{type(order).__name__} failed: {error!r}")
        else:
            answer(Reply(call.call, order_done=o.OrderDone(order.order, fingerprint=fingerprint)))

    def _work(self, message: o.EngineOrder) -> str:
        """Returns the fingerprint of weights that were read."""
        served = self._served
        match message:
            case o.ReadWeights():
                self._new = None  # never three copies
                self._new = read_weights(self._model, served, message.path)
                return self._new.fingerprint
            case o.UseWeights():
                if self._new is None:
                    raise RuntimeError("no weights have been read")
                use_weights(self._model, self._new)
                self.fingerprint = self._new.fingerprint
                self._new = None
            case o.DropWeights():
                self._new = None
            case o.ReleaseMemory():
                self._release(message)
                self.asleep = True
            case o.RestoreMemory():
                fingerprint = restore_weights(self._model, served, message.path) if message.weights else ""
                if message.kv:
                    self._worker.restore_memory()
                self.asleep = False
                self.fingerprint = fingerprint or self.fingerprint
                return fingerprint
        return ""

    def _release(self, message: o.ReleaseMemory) -> None:
        with giving_memory_back():
            if message.kv:
                self._worker.release_memory()
            if message.weights:
                release_weights(self._model, message.keep)
            gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._reading.shutdown(wait=False, cancel_futures=True)
