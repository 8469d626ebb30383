"""What whole steps cost on this machine: layerwise prefill of batches and decode steps, sample by sample.

`profiling` measures one attention layer for the compute quota; here it is everything an engine computes, as it computes
it. All shapes take a turn between two runs of one, since what disturbs may stay for seconds. With one compute thread
the process's own CPU time is taken, which other processes' turns on the cores are no part of: its mean is what many
such steps take each. With more threads it is wall time, of which the least says most.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import numpy as np
import torch

from dualpath.model.batch import PrefillItem
from dualpath.model.decode import DecodeEngine
from dualpath.model.layers import Bytes
from dualpath.model.model import LoadedModel
from dualpath.model.prefill import LayerwisePrefill
from dualpath.spec.sampling import SamplingParams

PREFILL_SHAPES = (
    (0, 16, 1), (0, 64, 1), (0, 256, 1), (0, 1024, 1), (0, 64, 4), (512, 64, 1), (512, 16, 8), (1024, 128, 1),
    (1024, 64, 4), (2048, 16, 1), (2048, 64, 1), (2048, 64, 4), (3072, 128, 1), (3072, 64, 8), (6144, 64, 1),
)  # fmt: skip
"""(cached tokens, new tokens, items)."""
DECODE_SHAPES = ((64, 1), (64, 8), (64, 16), (1024, 1), (1024, 4), (1024, 8), (3072, 1), (3072, 2), (3072, 4),
                 (3072, 8), (6144, 2), (6144, 4))  # fmt: skip
"""(context tokens of each, sequences)."""
RUNS = 10
GENERATE = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

Shape = TypeVar("Shape")


class PrefillSample(msgspec.Struct, frozen=True):
    """`items` chunks alike in one batch, all layers, nothing to wait for."""

    cached_tokens: int
    new_tokens: int
    items: int
    total_ns: float


class DecodeSample(msgspec.Struct, frozen=True):
    """One step of `sequences` sequences of `context_tokens` each."""

    context_tokens: int
    sequences: int
    step_ns: float


class NoTransfers:
    """`LayerIO` that leaves hit rows as they are."""

    def load_layer(self, _layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(destinations)

    def ship_layer(self, _layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(rows)


def measure_prefill(model: LoadedModel) -> list[PrefillSample]:
    """Batches of `PREFILL_SHAPES` that the model can hold."""
    shapes = [shape for shape in PREFILL_SHAPES if shape[0] + shape[1] <= model.max_length_tokens]
    prefill = LayerwisePrefill(model)

    def batch_ns(shape: tuple[int, int, int]) -> int:
        cached, new, items = shape
        batch = [PrefillItem([0] * new, cached, GENERATE)] * items
        started_ns = _now_ns()
        prefill.run(batch, NoTransfers())
        return _now_ns() - started_ns

    try:
        return [PrefillSample(*shape, total_ns) for shape, total_ns in in_rounds(shapes, batch_ns)]
    finally:
        prefill.close()


def measure_decode(model: LoadedModel) -> list[DecodeSample]:
    """Steps of `DECODE_SHAPES` that the model can hold."""
    shapes = [shape for shape in DECODE_SHAPES if shape[0] + GENERATE.max_tokens <= model.max_length_tokens]
    block_tokens = model.layout.block_tokens
    blocks = max(n * -(-(c + GENERATE.max_tokens) // block_tokens) for c, n in shapes)
    engine = DecodeEngine(model, blocks)

    def step_ns(shape: tuple[int, int]) -> int:
        context, sequences = shape
        for sequence in range(sequences):
            engine.admit(sequence, context, 0, GENERATE)
            engine.join(sequence)
        engine.step()
        started_ns = _now_ns()
        engine.step()
        ended_ns = _now_ns()
        for sequence in range(sequences):
            engine.release(sequence)
        return ended_ns - started_ns

    # The measured step is the second: every context has grown by a token.
    return [DecodeSample(context + 1, sequences, ns) for (context, sequences), ns in in_rounds(shapes, step_ns)]


def measure_block_copies(model: LoadedModel, blocks: int = 24) -> tuple[float, float]:
    """Nanoseconds to fill a Full Block of device memory from a page, and to copy one out; the least of a few rounds."""
    engine = DecodeEngine(model, blocks + 1)
    tokens = model.layout.block_tokens
    pages = np.zeros((blocks, model.layout.full_block_bytes), np.uint8)
    fill_ns = copy_ns = 0
    for sequence in range(RUNS):
        engine.admit(sequence, blocks * tokens, 0, msgspec.structs.replace(GENERATE, max_tokens=1))
        started_ns = _now_ns()
        for block in range(blocks):
            engine.fill_block(sequence, block, pages[block], tokens)
        filled_ns = _now_ns()
        for block in range(blocks):
            engine.copy_block(sequence, block, pages[block])
        copied_ns = _now_ns()
        engine.release(sequence)
        fill_ns = min(fill_ns or filled_ns - started_ns, filled_ns - started_ns)
        copy_ns = min(copy_ns or copied_ns - filled_ns, copied_ns - filled_ns)
    return fill_ns / blocks, copy_ns / blocks


def in_rounds(shapes: Sequence[Shape], measure_ns: Callable[[Shape], int]) -> list[tuple[Shape, float]]:
    """Every shape with what its `RUNS` runs come to, made in rounds over all shapes after one to warm up."""
    come_to = statistics.fmean if _cpu_time() else min
    rounds = [[measure_ns(shape) for shape in shapes] for _ in range(1 + RUNS)]
    return list(zip(shapes, map(come_to, zip(*rounds[1:], strict=True)), strict=True))


def _now_ns() -> int:
    return time.process_time_ns() if _cpu_time() else time.perf_counter_ns()


def _cpu_time() -> bool:
    return torch.get_num_threads() == 1
