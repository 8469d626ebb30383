"""Layerwise prefill (paper §5): a batch is computed with the KV of only a few layers on the device.

The runtime says how bytes move, through a `LayerIO`; this module says when. See `layers` for the order of things. A
batch is packed into one forward whatever its items' lengths are. An item whose load or shipping fails is carried along
to the end, where its rows are harmless because attention is per sequence, but nothing more is loaded or shipped for it.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from dualpath.engine.attention import PackedPass, PackedSequence
from dualpath.engine.layers import Bytes, DeviceLayers, LayerIOTimeoutError, LayerProgress, RunAbortedError
from dualpath.engine.model import LoadedModel
from dualpath.engine.sampling import TokenDraw, draw, finish_reason
from dualpath.spec.sampling import SamplingParams


class PrefillItem(msgspec.Struct, frozen=True):
    """One chunk of one request: `token_ids` are computed at positions `cached_tokens` onwards."""

    token_ids: list[int]
    """The chunk's own tokens, at least one; not those whose KV is loaded."""
    cached_tokens: int
    """Tokens before the chunk, whose KV `load_layer` provides: hits and earlier chunks."""
    sampling: SamplingParams | None = None
    """Given for a prompt's last chunk: draw the next token."""
    generated_so_far: int = 0
    """Tokens of the request generated before this draw; not 0 for a retried attempt."""


class PrefillOutput(msgspec.Struct, frozen=True):
    """What became of one item: an error, or done, with a token if `sampling` was given."""

    error: Exception | None = None
    token: TokenDraw | None = None
    finish_reason: str | None = None
    """Why the token already ends the request, if it does."""


class PrefillStatistics(msgspec.Struct, frozen=True):
    """The last run, as seen by its compute thread: `total` is the sum of the other three durations."""

    load_wait_ns: int
    compute_ns: int
    ship_wait_ns: int
    total_ns: int
    batch_tokens: int
    """Cached and new tokens of the batch."""
    peak_device_kv_bytes: int
    """The most KV of the batch that was on the device at once: layers resident × the batch's bytes of one layer."""


class LayerIO(Protocol):
    """How the KV of one run moves; list index = item index. Both calls must return within the run's `io_deadline_s`.

    An exception raised, instead of returned for an item, fails every item of the call.
    """

    def load_layer(self, layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        """Loader thread: fill ``destinations[i]``, ``cached_tokens_i × token_bytes`` bytes, None where there is nothing
        to load or the item has failed. Not called for a layer where all are None."""
        ...

    def ship_layer(self, layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        """Shipper thread: send on what is wanted of ``rows[i]``, the bytes of all cached and new tokens of the item in
        this layer, None where the item has failed. The memory is valid during the call only."""
        ...


class LayerwisePrefill:
    """Runs batches one after another on the calling thread, with a loader and a shipper thread of its own."""

    def __init__(
        self,
        model: LoadedModel,
        device_layers: int = 3,
        layerwise: bool = True,
        max_batch_tokens: int = 65536,
        io_deadline_s: float = 120.0,
    ) -> None:
        """`layerwise=False` holds all layers of the batch: loads all, computes all, ships all (the ablation's base).

        `max_batch_tokens` bounds cached and new tokens of a batch together, and with that the device buffers.
        """
        if device_layers < 2 or max_batch_tokens < 1:
            raise ValueError(f"{device_layers=} must be at least 2 and {max_batch_tokens=} at least 1")
        self.model = model
        self.max_batch_tokens = max_batch_tokens
        self.statistics: PrefillStatistics | None = None
        self._layerwise, self._io_deadline_s = layerwise, io_deadline_s
        layers = model.layout.layers
        self._slots = min(device_layers, layers) if layerwise else layers
        self._device = DeviceLayers(model.layout, self._slots, model.device, model.dtype)
        self._loader = ThreadPoolExecutor(1, "prefill-loader")
        self._shipper = ThreadPoolExecutor(1, "prefill-shipper")
        self._unusable: str | None = None

    def run(self, items: list[PrefillItem], io: LayerIO) -> list[PrefillOutput]:
        """Prefill `items` together; one output each, in order.

        Raises ValueError for a batch that can't be run, LayerIOTimeoutError when a callback hung (the object is then
        unusable), and whatever the model raised; items have no outputs then.
        """
        if self._unusable:
            raise RuntimeError(f"this prefill can't run any more: {self._unusable}")
        batch = _Batch(items, self._checked_tokens(items))
        if not items:
            return []
        self._device.reserve(batch.rows, self.max_batch_tokens)
        progress = LayerProgress(self.model.layout.layers, self._slots, not self._layerwise, self._io_deadline_s)
        started_ns = time.perf_counter_ns()
        workers = [
            self._loader.submit(_guarded, progress, lambda: self._load_all(batch, io, progress)),
            self._shipper.submit(_guarded, progress, lambda: self._ship_all(batch, io, progress)),
        ]
        logits = self._compute(batch, progress, workers)
        self._note_statistics(batch, progress, time.perf_counter_ns() - started_ns)
        return batch.outputs(logits)

    def close(self) -> None:
        """Stop the threads. A callback that hangs keeps its thread, and only it, alive."""
        self._unusable = self._unusable or "it is closed"
        for pool in (self._loader, self._shipper):
            pool.shutdown(wait=False, cancel_futures=True)

    def _checked_tokens(self, items: list[PrefillItem]) -> int:
        total = 0
        for index, item in enumerate(items):
            if not item.token_ids or item.cached_tokens < 0:
                raise ValueError(
                    f"item {index} has {len(item.token_ids)} tokens to compute after {item.cached_tokens} cached ones; "
                    "at least one is needed, after zero or more"
                )
            length = item.cached_tokens + len(item.token_ids)
            if length > self.model.max_length_tokens:
                raise ValueError(
                    f"item {index} reaches {length} tokens; the model takes {self.model.max_length_tokens}"
                )
            total += length
        if total > self.max_batch_tokens:
            raise ValueError(f"the batch has {total} tokens; max_batch_tokens is {self.max_batch_tokens}: split it")
        return total

    def _compute(self, batch: "_Batch", progress: LayerProgress, workers: list[Future[None]]) -> Tensor | None:
        """Logits of the sampling items, or None when every item had failed before the end."""
        try:
            packed = _PrefillPass(self.model, batch, self._device, progress)
            logits = self.model.forward(packed, batch.token_ids, batch.positions, batch.sampled_rows)
            progress.wait_all_shipped()
        except _NothingLeftError:
            return None
        except RunAbortedError as error:
            raise error.__cause__ or error from None
        except LayerIOTimeoutError:
            self._unusable = "an I/O callback of an earlier run did not return in time"
            raise
        finally:
            self._settle(progress, workers)
        return logits

    def _settle(self, progress: LayerProgress, workers: list[Future[None]]) -> None:
        """No thread touches the buffers after a run, or there is no other run."""
        progress.abort(RuntimeError("the run is over"))
        if not self._unusable and wait(workers, timeout=self._io_deadline_s).not_done:
            self._unusable = "an I/O callback of an earlier run did not return in time"
            raise LayerIOTimeoutError(f"an I/O callback did not return within {self._io_deadline_s:g} s")

    def _load_all(self, batch: "_Batch", io: LayerIO, progress: LayerProgress) -> None:
        for layer in range(progress.layers):
            progress.wait_slot(layer)
            wanted = [i for i in batch.alive() if batch.items[i].cached_tokens]
            destinations: list[Bytes | None] = [None] * len(batch.items)
            spans = [(batch.first_rows[i], batch.items[i].cached_tokens) for i in wanted]
            for i, span in zip(wanted, spans, strict=True):
                destinations[i] = self._device.destination(layer, *span)
            if wanted:
                batch.call(io.load_layer, layer, destinations)
                self._device.upload(layer, spans)
            progress.advance("loaded", layer)

    def _ship_all(self, batch: "_Batch", io: LayerIO, progress: LayerProgress) -> None:
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

    def _note_statistics(self, batch: "_Batch", progress: LayerProgress, total_ns: int) -> None:
        layer_bytes = batch.rows * self.model.layout.token_bytes
        self.statistics = PrefillStatistics(
            load_wait_ns=progress.load_wait_ns,
            compute_ns=total_ns - progress.load_wait_ns - progress.ship_wait_ns,
            ship_wait_ns=progress.ship_wait_ns,
            total_ns=total_ns,
            batch_tokens=batch.rows,
            peak_device_kv_bytes=progress.peak_resident_layers * layer_bytes,
        )


class _NothingLeftError(Exception):
    """Every item has failed; the rest of the forward would be for nothing."""


class _Batch:
    """Items packed one after another: item i has buffer rows ``first_rows[i] … + lengths[i]``, cached ones first."""

    def __init__(self, items: list[PrefillItem], rows: int) -> None:
        self.items, self.rows = items, rows
        self.errors: list[Exception | None] = [None] * len(items)
        self.lengths = [item.cached_tokens + len(item.token_ids) for item in items]
        self.first_rows: list[int] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.new_rows: list[int] = []
        self.sampled: list[int] = []
        self.sampled_rows: list[int] = []
        self._lock = threading.Lock()
        sequences: list[PackedSequence] = []
        first_row = 0
        for index, (item, length) in enumerate(zip(items, self.lengths, strict=True)):
            extent = (first_row, length)
            sequences.append(
                PackedSequence(len(self.token_ids), len(item.token_ids), item.cached_tokens, extents=(extent,))
            )
            self.first_rows.append(first_row)
            self.token_ids += item.token_ids
            self.positions += range(item.cached_tokens, length)
            self.new_rows += range(first_row + item.cached_tokens, first_row + length)
            if item.sampling is not None:
                self.sampled.append(index)
                self.sampled_rows.append(len(self.token_ids) - 1)
            first_row += length
        self.sequences = tuple(sequences)

    def alive(self) -> list[int]:
        with self._lock:
            return [i for i, error in enumerate(self.errors) if error is None]

    def call(
        self,
        callback: Callable[[int, list[Bytes | None]], list[Exception | None]],
        layer: int,
        spans: list[Bytes | None],
    ) -> None:
        """Call back into the runtime and note each item's first error."""
        asked = [i for i, span in enumerate(spans) if span is not None]
        try:
            errors = callback(layer, spans)
            if len(errors) != len(spans):
                raise ValueError(f"{callback} returned {len(errors)} results for {len(spans)} items")
        except Exception as error:
            errors = [error] * len(spans)
        with self._lock:
            for i in asked:
                self.errors[i] = self.errors[i] or errors[i]

    def outputs(self, logits: Tensor | None) -> list[PrefillOutput]:
        drawn: dict[int, TokenDraw | Exception] = {}
        if logits is not None and self.sampled:
            params = [p for i in self.sampled if (p := self.items[i].sampling) is not None]
            tokens = draw(logits, params, [self.items[i].generated_so_far for i in self.sampled])
            drawn = dict(zip(self.sampled, tokens, strict=True))
        return [self._output(i, drawn.get(i)) for i in range(len(self.items))]

    def _output(self, index: int, drawn: TokenDraw | Exception | None) -> PrefillOutput:
        error = self.errors[index] or (drawn if isinstance(drawn, Exception) else None)
        if error is not None or not isinstance(drawn, TokenDraw):
            return PrefillOutput(error=error)
        item = self.items[index]
        assert item.sampling is not None
        reason = finish_reason(item.sampling, drawn.token_id, item.generated_so_far + 1)
        return PrefillOutput(token=drawn, finish_reason=reason)


class _PrefillPass(PackedPass):
    """Ties the forward's layers to the run's progress."""

    def __init__(self, model: LoadedModel, batch: _Batch, device: DeviceLayers, progress: LayerProgress) -> None:
        super().__init__(model.form, batch.sequences, torch.tensor(batch.new_rows, device=model.device))
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
    """Run a worker's loop; its failure ends the other threads' waits, a stop asked by them is no failure."""
    try:
        work()
    except RunAbortedError:
        return
    except Exception as error:
        progress.abort(error)
