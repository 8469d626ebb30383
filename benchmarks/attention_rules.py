"""Measures what sparse attention and sliding windows save, beside dense attention of the same model.

    python benchmarks/attention_rules.py [--context 4000] [--only sparse] [--rounds 9] [--json FILE]

Each kind is a small seeded model twice, with the same weights: once with its rule, once without. Both have the same KV,
random numbers, and take turns in one process on one thread; in every round the other one begins. A figure is the dense
model's CPU time over the other one's, round by round: above 1 the rule saves time. Shown are the median and the
quartiles of the rounds, for a whole step or chunk and for its attention alone.

    sparse          DeepSeek-V3.2's attention, latents of 512, 32 heads; 16 index heads select 256 tokens. Dense:
                    as many are selected as there are, so nothing is scored (both compute the indexer's projections)
    window          gpt-oss's: 16 heads on 4 KV heads of 64, sinks, 128 tokens in every layer
    window, half    the same in every other layer, as gpt-oss has it

A *step* decodes four sequences; a *chunk* is 256 new tokens, the last of the context.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode, PrefillItem, make_checkpoint
from dualpath.model.attention import PackedPass
from dualpath.spec.sampling import SamplingParams

LAYERS, SEQUENCES, CHUNK, BLOCK = 4, 4, 256, 64
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {"num_hidden_layers": LAYERS, "hidden_size": 256, "max_position_embeddings": 131072}
SPARSE = {
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "index_n_heads": 16,
    "index_head_dim": 128,
}
WINDOW = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 128}
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "sparse": ("deepseek_v32", SPARSE, {"index_topk": 2**20}, {"index_topk": 256}),
    "window": ("gpt_oss", WINDOW, {"layer_types": [FULL] * LAYERS}, {"layer_types": [SLIDING] * LAYERS}),
    "window, half": ("gpt_oss", WINDOW, {"layer_types": [FULL] * LAYERS}, {"layer_types": [SLIDING, FULL] * 2}),
}
"""Architecture, sizes, what makes it dense, what makes it ruled."""

attention_ns = 0


def timed(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Counts the CPU time of every layer's attention in `attention_ns`."""

    def counted(*arguments: Any) -> Any:
        global attention_ns
        began_ns = time.thread_time_ns()  # other threads load and ship meanwhile
        out = attend(*arguments)
        attention_ns += time.thread_time_ns() - began_ns
        return out

    return counted


class Engine:
    """One model, ready to decode and to prefill with a context."""

    def __init__(self, path: Path, context: int, steps: int) -> None:
        self._model = LoadedModel.load(path)
        layout = self._model.layout
        numbers = np.random.default_rng(1).normal(size=layout.full_block_bytes // 4)
        self._block = numbers.astype(np.float32).view(np.uint8)
        self._prefill = LayerwisePrefill(self._model)
        self._item = PrefillItem([i % 250 for i in range(CHUNK)], context - CHUNK)
        self._decode = PagedDecode(self._model, SEQUENCES * -(-(context + steps) // BLOCK))
        sampling = SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True)
        for sequence in range(SEQUENCES):
            self._decode.admit(sequence, context, 5, sampling)
            for first in range(0, context, BLOCK):
                self._decode.fill_block(sequence, first // BLOCK, self._block, min(BLOCK, context - first))
            self._decode.join(sequence)

    def step(self) -> None:
        assert all(output.draw is not None for output in self._decode.step())

    def chunk(self) -> None:
        (output,) = self._prefill.run([self._item], self)
        assert output.error is None

    def load_layer(self, layer: int, destinations: list[Any]) -> list[Exception | None]:
        """`LayerIO`: the context's rows."""
        del layer
        (destination,) = destinations
        layer_bytes = self._block.nbytes // LAYERS
        for start in range(0, destination.nbytes, layer_bytes):
            destination[start : start + layer_bytes] = self._block[: min(layer_bytes, destination.nbytes - start)]
        return [None]

    def ship_layer(self, layer: int, rows: list[Any]) -> list[Exception | None]:
        del layer
        return [None] * len(rows)


def milliseconds(call: Callable[[], None]) -> tuple[float, float]:
    """CPU time of a call, and of its attention."""
    global attention_ns
    attention_ns, began_ns = 0, time.process_time_ns()
    call()
    return (time.process_time_ns() - began_ns) / 1e6, attention_ns / 1e6


def spread(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([dense / ruled for dense, ruled in pairs], n=4)
    dense_ms, ruled_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ratio": median, "quartiles": [low, high], "dense_ms": dense_ms, "ruled_ms": ruled_ms}


def compare(name: str, dense: Engine, ruled: Engine, rounds: int) -> dict[str, Any]:
    results = {}
    for what in ("step", "chunk"):
        taken: list[dict[Engine, tuple[float, float]]] = []
        for number in range(rounds + 1):
            order = (dense, ruled) if number % 2 else (ruled, dense)
            taken.append({engine: milliseconds(getattr(engine, what)) for engine in order})
            print(f"\r  {what}: round {number} of {rounds} ", end="", file=sys.stderr, flush=True)
        for index, part in enumerate(("", ", attention")):
            found = spread([(one[dense][index], one[ruled][index]) for one in taken[1:]])  # the first one warms up
            low, high = found["quartiles"]
            print(
                f"\r{name + ', ' + what + part:32}{found['ratio']:6.2f}  ({low:.2f} to {high:.2f})  "
                f"dense {found['dense_ms']:7.1f} ms, ruled {found['ruled_ms']:7.1f} ms",
                flush=True,
            )
            results[f"{name}, {what}{part}"] = found
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4000, help="tokens, at least 512")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements of each kind, at least 3")
    parser.add_argument("--only", default="", help="what is measured: a part of its name")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    if options.context < 2 * CHUNK or options.rounds < 3:
        parser.error(f"--context must be at least {2 * CHUNK} and --rounds at least 3")
    PackedPass.attend = timed(PackedPass.attend)  # type: ignore[method-assign]
    results = {}
    for name, (architecture, sizes, without, with_rule) in KINDS.items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / "dense", Path(folder) / "ruled"]
            for path, rule in zip(paths, (without, with_rule), strict=True):
                make_checkpoint(path, architecture, **COMMON, **sizes, **rule)
            engines = [Engine(path, options.context, steps=options.rounds + 3) for path in paths]
        results |= compare(name, engines[0], engines[1], options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
