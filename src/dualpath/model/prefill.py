"""Layerwise prefill (paper §5): computes a batch with the KV of only a few layers on the device.

The caller's `LayerIO` says how bytes move; this module says when. `layers` has the order of the stages; read it next. A
batch is packed into one forward, whatever its items' lengths. An item whose load or shipping fails stays in the forward
to the end. Its rows are harmless, because attention is per sequence; nothing more is loaded or shipped for it.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from dualpath.model.attention import PackedPass
from dualpath.model.batch import PrefillBatch, PrefillItem, PrefillOutput
from dualpath.model.device_copies import DeviceCopies, MemcpyCopies
from dualpath.model.layers import (
    Bytes,
    DeviceLayers,
    HostMemory,
    LayerIOTimeoutError,
    LayerProgress,
    OwnMemory,
    RunAbortedError,
)
from dualpath.model.model import LoadedModel
from dualpath.model.scoring import PromptScores, score
from dualpath.thread_names import named_threads


class PrefillStatistics(msgspec.Struct, frozen=True):
    """The last run, as its compute thread saw it: `total` is the sum of the other three durations."""

    load_wait_ns: int
    compute_ns: int
    ship_wait_ns: int
    total_ns: int
    batch_tokens: int
    """Cached and new tokens of the batch."""
    peak_device_kv_bytes: int
    """Peak KV of the batch on the device: resident layers × the batch's bytes of one layer."""


class LayerIO(Protocol):
    """How the KV of one run moves; list index = item index. Both calls must return within the run's `io_deadline_s`.

    An exception that is raised, instead of returned for an item, fails every item of the call.
    """

    def load_layer(self, layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        """Loader thread: fill ``destinations[i]``, `past_tokens` rows of the layer; of one with a window, the rows that
        it sees. None means that the item has nothing to load or has failed. Not called when all are None."""
        ...

    def ship_layer(self, layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        """Shipper thread: send what is needed of ``rows[i]``, the bytes of all cached and new tokens of the item in
        this layer; None means that the item has failed. The memory is valid only during the call."""
        ...


class LayerwisePrefill:
    """Runs batches one after another on the calling thread; it owns a loader thread and a shipper thread."""

    def __init__(
        self,
        model: LoadedModel,
        device_layers: int = 3,
        layerwise: bool = True,
        max_batch_tokens: int = 65536,
        io_deadline_s: float = 120.0,
        memory: HostMemory | None = None,
        copies: DeviceCopies | None = None,
    ) -> None:
        """`layerwise=False` holds all layers of the batch: it loads all, computes all, ships all (the ablation's base).

        `max_batch_tokens` bounds a batch's cached and new tokens together, and therefore the device buffers. `memory`
        is where the callbacks' host memory comes from, `copies` what moves it to an accelerator and back.
        """
        if device_layers < 2 or max_batch_tokens < 1:
            raise ValueError(f"{device_layers=} must be at least 2 and {max_batch_tokens=} at least 1")
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.statistics: PrefillStatistics | None = None
        self._layerwise, self._io_deadline_s = layerwise, io_deadline_s
        layers = model.layout.layers
        self._slots = min(device_layers, layers) if layerwise else layers
        self._memory = memory or OwnMemory()
        self._copies = copies or MemcpyCopies()
        self._device = self._new_device()
        self._loader = named_threads(1, "prefill-loader")
        self._shipper = named_threads(1, "prefill-shipper")
        self._unusable: str | None = None

    def run(self, items: list[PrefillItem], io: LayerIO) -> list[PrefillOutput]:
        """Prefill `items` together. Returns one output per item, in order.

        Raises ValueError for a batch that can't be run, LayerIOTimeoutError when a callback hung (the object is then
        unusable), and whatever the model raises.
        """
        if self._unusable:
            raise RuntimeError(f"this prefill can't run any more: {self._unusable}")
        batch = PrefillBatch(items, self._checked_tokens(items))
        if not items:
            return []
        self._device.reserve(batch.rows, self.max_batch_tokens)
        progress = LayerProgress(self.model.layout.layers, self._slots, not self._layerwise, self._io_deadline_s)
        started_ns = time.perf_counter_ns()
        workers = [
            self._loader.submit(_guarded, progress, lambda: self._load_all(batch, io, progress)),
            self._shipper.submit(_guarded, progress, lambda: self._ship_all(batch, io, progress)),
        ]
        logits, scores = self._compute(batch, progress, workers)
        self._note_statistics(batch, progress, time.perf_counter_ns() - started_ns)
        return batch.outputs(logits, scores)

    def release_memory(self) -> None:
        """Give the device buffers back; the next run takes new ones."""
        self._device.close()
        self._device = self._new_device()

    def _new_device(self) -> DeviceLayers:
        model = self.model
        return DeviceLayers(model.layout, self._slots, model.device, model.dtype, self._memory, self._copies)

    def close(self) -> None:
        """Stop the threads. A callback that hangs keeps only its own thread alive."""
        self._unusable = self._unusable or "it is closed"
        for pool in (self._loader, self._shipper):
            pool.shutdown(wait=False, cancel_futures=True)

    def _checked_tokens(self, items: list[PrefillItem]) -> int:
        total = 0
        for index, item in enumerate(items):
            if not item.token_ids or item.past_tokens < 0:
                raise ValueError(
                    f"item {index} has {len(item.token_ids)} tokens to compute after {item.past_tokens} cached ones; "
                    "at least one is needed, after zero or more"
                )
            length = item.past_tokens + len(item.token_ids)
            if length > self.model.max_length_tokens:
                raise ValueError(
                    f"item {index} reaches {length} tokens; the model takes {self.model.max_length_tokens}"
                )
            total += length
        if total > self.max_batch_tokens:
            raise ValueError(f"the batch has {total} tokens, above max_batch_tokens {self.max_batch_tokens}; split it")
        return total

    def _compute(
        self, batch: PrefillBatch, progress: LayerProgress, workers: list[Future[None]]
    ) -> tuple[Tensor | None, dict[int, PromptScores]]:
        """Returns logits of the sampling items, None when every item has failed before the end; and scores by item."""
        scores: dict[int, PromptScores] = {}
        try:
            packed = _PrefillPass(self.model, batch, self._device, progress)
            if any(item.scored for item in batch.items):
                logits = self._score(batch, packed, scores)
            else:
                logits = self.model.forward(packed, batch.token_ids, batch.positions, batch.sampled_rows)
            progress.wait_all_shipped()
        except _NothingLeftError:
            return None, scores
        except RunAbortedError as error:
            raise error.__cause__ or error from None
        except LayerIOTimeoutError:
            self._unusable = "an I/O callback of an earlier run did not return in time"
            raise
        finally:
            self._settle(progress, workers)
        return logits, scores

    def _score(self, batch: PrefillBatch, packed: PackedPass, scores: dict[int, PromptScores]) -> Tensor:
        """Fill `scores`. Returns logits of the sampling items."""
        hidden = self.model.hidden(packed, batch.token_ids, batch.positions)
        for i, (item, first) in enumerate(zip(batch.items, batch.first_queries, strict=True)):
            if item.scored is not None and item.scored.next_token_ids:
                scores[i] = score(self.model, hidden[first:], item.scored.next_token_ids, item.scored.top)
        return self.model.head(hidden[batch.sampled_rows])

    def _settle(self, progress: LayerProgress, workers: list[Future[None]]) -> None:
        """Make sure that no thread touches the buffers after this run; if one hangs, forbid further runs."""
        progress.abort(RuntimeError("the run is over"))
        if not self._unusable and wait(workers, timeout=self._io_deadline_s).not_done:
            self._unusable = "an I/O callback of an earlier run did not return in time"
            raise LayerIOTimeoutError(f"an I/O callback did not return within {self._io_deadline_s:g} s")

    def _load_all(self, batch: PrefillBatch, io: LayerIO, progress: LayerProgress) -> None:
        for layer in range(progress.layers):
            progress.wait_slot(layer)
            wanted = [i for i in batch.alive() if batch.items[i].past_tokens]
            destinations: list[Bytes | None] = [None] * len(batch.items)
            for i in wanted:
                destinations[i] = self._device.destination(layer, batch.first_rows[i], batch.items[i].past_tokens)
            if wanted:
                batch.call(io.load_layer, layer, destinations)
                first_seen = self.model.layout.kind(layer).first_seen
                past = [(batch.first_rows[i], batch.items[i].past_tokens) for i in wanted]
                self._device.upload(layer, [(row + first_seen(n), n - first_seen(n)) for row, n in past])
            progress.advance("loaded", layer)

    def _ship_all(self, batch: PrefillBatch, io: LayerIO, progress: LayerProgress) -> None:
        for layer in range(progress.layers):
            progress.wait_written(layer)
            wanted = batch.alive()
            rows: list[Bytes | None] = [None] * len(batch.items)
            spans = [(batch.first_rows[i], batch.lengths[i]) for i in wanted]
            for i, span in zip(wanted, self._device.download(layer, spans), strict=True):
                rows[i] = span
            if wanted:
                batch.call(io.ship_layer, layer, rows)
            progress.advance("shipped", layer)

    def _note_statistics(self, batch: PrefillBatch, progress: LayerProgress, total_ns: int) -> None:
        layer_bytes = batch.rows * max(self.model.layout.row_bytes)
        self.statistics = PrefillStatistics(
            load_wait_ns=progress.load_wait_ns,
            compute_ns=total_ns - progress.load_wait_ns - progress.ship_wait_ns,
            ship_wait_ns=progress.ship_wait_ns,
            total_ns=total_ns,
            batch_tokens=batch.rows,
            peak_device_kv_bytes=progress.peak_resident_layers * layer_bytes,
        )


class _NothingLeftError(Exception):
    """Every item has failed; the rest of the forward would be useless."""


class _PrefillPass(PackedPass):
    """Ties the forward's layers to the run's progress."""

    def __init__(self, model: LoadedModel, batch: PrefillBatch, device: DeviceLayers, progress: LayerProgress) -> None:
        super().__init__(model.forms, batch.sequences, torch.tensor(batch.new_rows, device=model.device))
        self._batch, self._device, self._progress = batch, device, progress

    def layer_rows(self, layer: int) -> Tensor:
        self._progress.wait_loaded(layer)
        if not self._batch.alive():
            raise _NothingLeftError
        return self._device.rows(layer)

    def written(self, layer: int) -> None:
        self._device.mark("written", layer)
        self._progress.advance("written", layer)

    def attended(self, layer: int) -> None:
        self._device.mark("attended", layer)
        self._progress.advance("attended", layer)


def _guarded(progress: LayerProgress, work: Callable[[], None]) -> None:
    """Run a worker's loop. If it fails, abort the other threads' waits; being aborted by them is not a failure."""
    try:
        work()
    except RunAbortedError:
        return
    except Exception as error:
        progress.abort(error)
