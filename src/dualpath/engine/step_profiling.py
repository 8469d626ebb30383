"""What whole steps cost on this machine: layerwise prefill of batches and decode steps, sample by sample.

`profiling` measures one attention layer for the compute quota; here it is everything an engine computes, as it computes
it. A sample is the least of a few runs: what disturbs a run only ever makes it longer. With one compute thread the
process's own CPU time is taken, which other processes' turns on the cores are no part of; with more, wall time.
"""

import time
from collections.abc import Callable

import msgspec
import numpy as np
import torch

from dualpath.engine.batch import PrefillItem
from dualpath.engine.decode import DecodeEngine
from dualpath.engine.layers import Bytes
from dualpath.engine.model import LoadedModel
from dualpath.engine.prefill import LayerwisePrefill
from dualpath.spec.sampling import SamplingParams

PREFILL_SHAPES = (
    (0, 16, 1), (0, 64, 1), (0, 256, 1), (0, 1024, 1), (0, 64, 4), (512, 64, 1), (512, 16, 8), (1024, 128, 1),
    (1024, 64, 4), (2048, 16, 1), (2048, 64, 1), (2048, 64, 4), (3072, 128, 1), (3072, 64, 8), (6144, 64, 1),
)  # fmt: skip
"""(cached tokens, new tokens, items)."""
DECODE_SHAPES = ((64, 1), (64, 8), (64, 16), (1024, 1), (1024, 4), (1024, 8), (3072, 1), (3072, 2), (3072, 4),
                 (3072, 8), (6144, 2), (6144, 4))  # fmt: skip
"""(context tokens of each, sequences)."""
RUNS = 4
GENERATE = SamplingParams(max_tokens=4 * RUNS, temperature=0, ignore_eos=True)


class PrefillSample(msgspec.Struct, frozen=True):
    """`items` chunks alike in one batch, all layers, nothing to wait for."""

    cached_tokens: int
    new_tokens: int
    items: int
    total_ns: int


class DecodeSample(msgspec.Struct, frozen=True):
    """One step of `sequences` sequences of `context_tokens` each."""

    context_tokens: int
    sequences: int
    step_ns: int


class NoTransfers:
    """`LayerIO` that leaves hit rows as they are."""

    def load_layer(self, _layer: int, destinations: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(destinations)

    def ship_layer(self, _layer: int, rows: list[Bytes | None]) -> list[Exception | None]:
        return [None] * len(rows)


def measure_prefill(model: LoadedModel) -> list[PrefillSample]:
    """Batches of `PREFILL_SHAPES` that the model can hold."""
    prefill = LayerwisePrefill(model)
    samples = []
    try:
        for cached, new, items in PREFILL_SHAPES:
            if cached + new <= model.max_length_tokens:
                batch = [PrefillItem([0] * new, cached, GENERATE)] * items
                total_ns = least_ns(lambda batch=batch: prefill.run(batch, NoTransfers()))  # type: ignore[misc]
                samples.append(PrefillSample(cached, new, items, total_ns))
    finally:
        prefill.close()
    return samples


def measure_decode(model: LoadedModel) -> list[DecodeSample]:
    """Steps of `DECODE_SHAPES` that the model can hold."""
    longest = [(c, n) for c, n in DECODE_SHAPES if c + GENERATE.max_tokens <= model.max_length_tokens]
    block_tokens = model.layout.block_tokens
    blocks = max(n * -(-(c + GENERATE.max_tokens) // block_tokens) for c, n in longest)
    engine = DecodeEngine(model, blocks)
    return [_decode_sample(engine, context, sequences) for context, sequences in longest]


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


def least_ns(work: Callable[[], object], runs: int = RUNS) -> int:
    """The least of `runs` runs, after one to warm up."""
    work()
    times_ns = []
    for _ in range(runs):
        started_ns = _now_ns()
        work()
        times_ns.append(_now_ns() - started_ns)
    return min(times_ns)


def _decode_sample(engine: DecodeEngine, context: int, sequences: int) -> DecodeSample:
    for sequence in range(sequences):
        engine.admit(sequence, context, 0, GENERATE)
        engine.join(sequence)
    step_ns = least_ns(engine.step, 2 * RUNS)
    for sequence in range(sequences):
        engine.release(sequence)
    # Contexts grew by a token a step; the middle one is what the least stands for.
    return DecodeSample(context + RUNS, sequences, step_ns)


def _now_ns() -> int:
    return time.process_time_ns() if torch.get_num_threads() == 1 else time.perf_counter_ns()
