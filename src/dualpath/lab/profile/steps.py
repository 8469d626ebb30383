"""Measures an engine's steps as it computes them: layerwise prefill of batches, and decode steps.

All shapes run once before any runs again, because a disturbance may last for seconds. With one compute thread on a CPU,
the figure is the mean CPU time of the process: other processes do not add to it, and many steps take that long each.
Otherwise it is the least wall time, which other jobs disturb least.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from dualpath.cluster.engines.prefill import NoTransfers
from dualpath.lab.facts.step_times import DecodeSample, PrefillSample
from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode, PrefillItem
from dualpath.spec.sampling import SamplingParams

PREFILL_SHAPES = (
    (0, 16, 1), (0, 64, 1), (0, 256, 1), (0, 1024, 1), (0, 64, 4), (512, 64, 1), (512, 16, 8), (1024, 128, 1),
    (1024, 64, 4), (2048, 16, 1), (2048, 64, 1), (2048, 64, 4), (3072, 128, 1), (3072, 64, 8), (6144, 64, 1),
)  # fmt: skip
"""(cached tokens, new tokens, items)."""
DECODE_SHAPES = (
    (1, 64), (8, 64), (16, 64), (1, 1024), (4, 1024), (8, 1024), (1, 3072), (2, 3072), (4, 3072), (8, 3072), (2, 6144),
    (4, 6144),
)  # fmt: skip
"""(sequences, context tokens of each)."""
RUNS = 10
GENERATE = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)

Advance = Callable[[], None]


def measure_prefill(model: LoadedModel, advance: Advance) -> list[PrefillSample]:
    """Measures the `PREFILL_SHAPES` that the model can hold; calls `advance` after each of `RUNS` + 1 rounds."""
    shapes = [shape for shape in PREFILL_SHAPES if shape[0] + shape[1] <= model.max_length_tokens]
    prefill = LayerwisePrefill(model)

    def run(shape: tuple[int, ...]) -> int:
        cached, new, items = shape
        batch = [PrefillItem([0] * new, cached, GENERATE)] * items
        started_ns = _now_ns(model)
        prefill.run(batch, NoTransfers())
        return _now_ns(model) - started_ns

    try:
        return [
            PrefillSample(cached_tokens=cached, new_tokens=new, items=items, ns=ns)
            for (cached, new, items), ns in _in_rounds(model, shapes, run, advance)
        ]
    finally:
        prefill.close()


def measure_decode(model: LoadedModel, advance: Advance) -> list[DecodeSample]:
    """Measures the `DECODE_SHAPES` that the model can hold, in the same way."""
    shapes = [shape for shape in DECODE_SHAPES if shape[1] + GENERATE.max_tokens <= model.max_length_tokens]
    block_tokens = model.layout.block_tokens
    engine = PagedDecode(model, max(n * -(-(c + GENERATE.max_tokens) // block_tokens) for n, c in shapes))

    def run(shape: tuple[int, ...]) -> int:
        batch, context = shape
        for sequence in range(batch):
            engine.admit(sequence, context, 0, GENERATE)
            engine.join(sequence)
        engine.step()
        started_ns = _now_ns(model)
        engine.step()
        ended_ns = _now_ns(model)
        for sequence in range(batch):
            engine.release(sequence)
        return ended_ns - started_ns

    # The measured step is the second: every context has grown by a token.
    return [
        DecodeSample(batch=batch, context_tokens=context + 1, ns=ns)
        for (batch, context), ns in _in_rounds(model, shapes, run, advance)
    ]


def _in_rounds(
    model: LoadedModel, shapes: Sequence[tuple[int, ...]], run_ns: Callable[[tuple[int, ...]], int], advance: Advance
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Returns every shape with the figure of its `RUNS` runs, made in rounds over all shapes after a warm-up round."""
    rounds = []
    for _ in range(1 + RUNS):
        rounds.append([run_ns(shape) for shape in shapes])
        advance()
    come_to = statistics.fmean if _by_cpu_time(model) else min
    return zip(shapes, map(come_to, zip(*rounds[1:], strict=True)), strict=True)


def _now_ns(model: LoadedModel) -> int:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.process_time_ns() if _by_cpu_time(model) else time.perf_counter_ns()


def _by_cpu_time(model: LoadedModel) -> bool:
    return model.device.type == "cpu" and torch.get_num_threads() == 1
