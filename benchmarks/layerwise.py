"""Measures how well layerwise prefill hides loading, what it keeps on the device, and what prefill and decode cost.

    python benchmarks/layerwise.py [--json FILE] [--threads 1]

It runs the demo model on this machine's CPU. Loads are paced to a stated rate by sleeping, so a load costs wall time
but no CPU, as on a NIC. Each paced run is compared with its own load time and with a run of instant loads just before
it; the median pair is shown. Figures of decode and of the short chunk are the best of several. Other load on the
machine shows as a wall time above the CPU time.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode, PrefillItem, make_checkpoint
from dualpath.model.checkpoint import DEMO_MODEL
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.units import format_bytes, format_rate

PAIRS = 7
GREEDY = SamplingParams(max_tokens=64, temperature=0.0)


class PacedIO:
    """A LayerIO whose loads take ``bytes / rate`` seconds and leave hit rows unchanged; shipping is instant.

    `zeros` writes the rows: a first run must, because fresh device memory may hold NaNs.
    """

    def __init__(self, bytes_per_s: float | None, zeros: bool = False) -> None:
        self.bytes_per_s = bytes_per_s
        self.zeros = zeros
        self.load_s = 0.0

    def load_layer(self, layer: int, destinations: list[np.ndarray | None]) -> list[Exception | None]:
        del layer
        for destination in destinations if self.zeros else ():
            if destination is not None:
                destination.fill(0)
        started_s = time.perf_counter()
        if self.bytes_per_s is not None:
            time.sleep(sum(d.nbytes for d in destinations if d is not None) / self.bytes_per_s)
        self.load_s += time.perf_counter() - started_s
        return [None] * len(destinations)

    def ship_layer(self, layer: int, rows: list[np.ndarray | None]) -> list[Exception | None]:
        del layer
        return [None] * len(rows)


def measure_prefill(engine: LayerwisePrefill, items: list[PrefillItem], rate: float | None) -> dict[str, float]:
    io = PacedIO(rate)
    started_s = time.perf_counter()
    outputs = engine.run(items, io)
    wall_s = time.perf_counter() - started_s
    assert engine.statistics is not None and all(output.error is None for output in outputs)
    peak = engine.statistics.peak_device_kv_bytes
    return {"wall_s": wall_s, "load_s": io.load_s, "peak_device_kv_bytes": peak}


def overlap(model: LoadedModel, name: str, layerwise: bool, load_to_compute: float) -> dict[str, Any]:
    """Runs a batch of 4 × (64 new on 2,048 cached tokens) whose loads take `load_to_compute` times the compute time."""
    items = [PrefillItem([17 * i % 256 for i in range(64)], 2048, GREEDY) for _ in range(4)]
    engine = LayerwisePrefill(model, layerwise=layerwise)
    engine.run(items, PacedIO(None, zeros=True))
    compute_s = min(measure_prefill(engine, items, None)["wall_s"] for _ in range(3))
    cached_bytes = sum(item.past_tokens for item in items) * model.layout.kv_bytes.bytes_per_token
    rate = cached_bytes / (compute_s * load_to_compute)
    pairs = [(measure_prefill(engine, items, None), measure_prefill(engine, items, rate)) for _ in range(PAIRS)]
    engine.close()
    batch_layer_bytes = sum(item.past_tokens + len(item.token_ids) for item in items) * model.layout.row_bytes[0]
    rows = [
        {
            "compute_s": alone["wall_s"],
            **paced,
            "wall_over_longest": paced["wall_s"] / max(alone["wall_s"], paced["load_s"]),
            "wall_over_sum": paced["wall_s"] / (alone["wall_s"] + paced["load_s"]),
            "peak_device_layers": paced["peak_device_kv_bytes"] / batch_layer_bytes,
        }
        for alone, paced in pairs
    ]
    median = sorted(rows, key=lambda row: row["wall_over_longest"])[PAIRS // 2]
    return {"case": name, "layerwise": layerwise, "load_bytes_per_s": rate, **median}


def short_chunk(model: LoadedModel) -> dict[str, float]:
    items = [PrefillItem([17 * i % 256 for i in range(64)], 4096, GREEDY)]
    engine = LayerwisePrefill(model)
    engine.run(items, PacedIO(None, zeros=True))
    wall_s = min(measure_prefill(engine, items, None)["wall_s"] for _ in range(8))
    engine.close()
    return {"new_tokens": 64, "past_tokens": 4096, "prefill_ms": 1e3 * wall_s}


def decode_step(model: LoadedModel, sequences: int, context_tokens: int) -> dict[str, float]:
    """Returns milliseconds of a step and of the process's CPU time. The KV is noise, which costs the same."""
    blocks = -(-(context_tokens + 64) // 64)
    decode = PagedDecode(model, blocks * sequences)
    page = np.random.default_rng(0).standard_normal(model.layout.full_block_bytes // 4, dtype=np.float32).view(np.uint8)
    for sequence in range(sequences):
        decode.admit(sequence, context_tokens, first_token=1, sampling=GREEDY)
        for block in range(context_tokens // 64):
            decode.fill_block(sequence, block, page, 64)
        decode.join(sequence)
    walls_ms, cpus_ms = [], []
    for _ in range(30):
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        decode.step()
        walls_ms.append(1e3 * (time.perf_counter() - wall_s))
        cpus_ms.append(1e3 * (time.process_time() - cpu_s))
    return {
        "sequences": sequences,
        "context_tokens": context_tokens,
        "step_ms": min(walls_ms),
        "median_step_ms": sorted(walls_ms)[15],
        "cpu_ms": min(cpus_ms),
    }


def run(model: LoadedModel) -> dict[str, Any]:
    return {
        "overlap": [
            overlap(model, name, layerwise, ratio)
            for name, ratio in (("load-bound", 2.5), ("balanced", 1.0), ("compute-bound", 0.4))
            for layerwise in (True, False)
        ],
        "decode": [decode_step(model, n, context) for n in (1, 4, 8) for context in (1024, 3072, 4096)],
        "prefill": short_chunk(model),
    }


def show(results: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table(title="Prefill of 4 × (64 new on 2,048 cached tokens), paced loads")
    for column in (
        "case",
        "layerwise",
        "load rate",
        "compute ms",
        "load ms",
        "wall ms",
        "wall/max",
        "wall/sum",
        "peak KV",
    ):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in results["overlap"]:
        times = [f"{1e3 * row[key]:.0f}" for key in ("compute_s", "load_s", "wall_s")]
        ratios = [f"{row[key]:.2f}" for key in ("wall_over_longest", "wall_over_sum")]
        peak = f"{format_bytes(row['peak_device_kv_bytes'])} = {row['peak_device_layers']:.0f} layers"
        layerwise = "yes" if row["layerwise"] else "no"
        table.add_row(row["case"], layerwise, format_rate(row["load_bytes_per_s"]), *times, *ratios, peak)
    console.print(table)
    table = Table(title="Decode step")
    for column in ("sequences", "context tokens", "best ms", "median ms", "CPU ms"):
        table.add_column(column, justify="right")
    for row in results["decode"]:
        figures = [f"{row[key]:.1f}" for key in ("step_ms", "median_step_ms", "cpu_ms")]
        table.add_row(str(row["sequences"]), str(row["context_tokens"]), *figures)
    console.print(table)
    chunk = results["prefill"]
    console.print(
        f"prefill of {chunk['new_tokens']} new on {chunk['past_tokens']} cached: {chunk['prefill_ms']:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = LoadedModel.load(make_checkpoint(folder, **DEMO_MODEL), threads=arguments.threads)
        results = run(model)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results | {"threads": arguments.threads}, indent=2) + "\n")


if __name__ == "__main__":
    main()
