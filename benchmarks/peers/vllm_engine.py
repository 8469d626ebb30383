"""Compares our engine with plain vLLM: same CPU, same model, float32, one thread each, side by side in one run.

    python benchmarks/peers/vllm_engine.py [--model DIR] [--only decode] [--rounds 12] [--json FILE]

vLLM (`make setup-vllm`) runs in a process of its own, without a server: requests go into its engine, and single steps
are timed. Ours runs in this process. They take turns, so that one waits while the other computes, and in every round
the other one begins. A figure is the CPU time of vLLM over ours, round by round: above 1 ours is faster. Shown are the
median and the quartiles of the rounds, and each engine's median time. CPU time does not count what other processes
take, but they slow both down; quartiles far apart say so.

    prefill N           one prompt of N tokens, nothing cached, one step up to its first token
    chunk M after N     M new tokens after N cached ones: vLLM has them in its prefix cache, ours copies them in
    decode S x N        one step of S sequences with N tokens of context each: S tokens

Both engines draw greedily. vLLM runs eagerly, as its servers do here on a CPU; its text side is off, ours has none.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllm_worker import BLOCK_TOKENS, DECODES, VOCABULARY, blocks_of, tokens

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5
"""Decode steps that are timed together."""
PREFILLS = {"prefill 1000": (0, 1000), "prefill 4000": (0, 4000), "chunk 256 after 3008": (3008, 256)}
"""(cached, new) tokens."""
Engine = Any
"""`Ours`, or `Remote`, which is vllm_worker.py's `Vllm` in its process; see `Ours` for the methods."""


class Ours:
    """Our engine: a prefill and a decode object, without a cluster around them."""

    def __init__(self, model: str) -> None:
        import numpy as np

        from dualpath.model import LayerwisePrefill, LoadedModel, PagedDecode

        self._model = LoadedModel.load(model, threads=1)
        self._prefill = LayerwisePrefill(self._model)
        most = max(sequences * blocks_of(context) for sequences, context in DECODES.values())
        self._decode = PagedDecode(self._model, most)
        kv = np.random.default_rng(1).normal(size=(self._model.layout.full_block_bytes // 4,)).astype(np.float32)
        self._block = kv.view(np.uint8)

    def prefill(self, cached: int, new: int, seed: int) -> float:
        """Returns the CPU milliseconds of computing `new` tokens after `cached` ones."""
        from dualpath.model import PrefillItem
        from dualpath.spec.sampling import SamplingParams

        item = PrefillItem(tokens(new, seed), cached, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        began_ns = time.process_time_ns()
        (output,) = self._prefill.run([item], self)
        assert output.error is None
        return (time.process_time_ns() - began_ns) / 1e6

    def load_layer(self, layer: int, destinations: list[Any]) -> list[Exception | None]:
        """`LayerIO`: the cached rows of a layer, copied from host memory."""
        del layer
        (destination,) = destinations
        layer_bytes = self._block.nbytes // self._model.layout.layers
        for start in range(0, destination.nbytes, layer_bytes):
            destination[start : start + layer_bytes] = self._block[: min(layer_bytes, destination.nbytes - start)]
        return [None]

    def ship_layer(self, layer: int, rows: list[Any]) -> list[Exception | None]:
        del layer
        return [None] * len(rows)

    def open(self, sequences: int, context: int, seed: int) -> None:
        """Admit sequences with their KV, ready to be stepped."""
        from dualpath.spec.sampling import SamplingParams

        sampling = SamplingParams(
            max_tokens=blocks_of(context) * BLOCK_TOKENS - context, temperature=0.0, ignore_eos=True
        )
        for sequence in range(sequences):
            self._decode.admit(sequence, context, seed % VOCABULARY, sampling)
            for first in range(0, context, BLOCK_TOKENS):
                count = min(BLOCK_TOKENS, context - first)
                self._decode.fill_block(sequence, first // BLOCK_TOKENS, self._block, count)
            self._decode.join(sequence)

    def step(self, count: int) -> float:
        """Returns the CPU milliseconds of a decode step, the mean of `count`."""
        began_ns = time.process_time_ns()
        for _ in range(count):
            outputs = self._decode.step()
        taken_ns = time.process_time_ns() - began_ns
        assert outputs and all(output.finish_reason is None and output.draw for output in outputs)
        return taken_ns / 1e6 / count

    def close(self, sequences: int) -> None:
        for sequence in range(sequences):
            self._decode.release(sequence)


class Remote:
    """vllm_worker.py's `Vllm`, by the pipes of its process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
            raise SystemExit(f"vLLM's process ended; the end of its log:\n{tail}")
        return json.loads(line)

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: int) -> Any:
            commands: IO[str] | None = self._process.stdin
            assert commands is not None
            commands.write(json.dumps([method, arguments]) + "\n")
            commands.flush()
            return self._answer()

        return call


@contextlib.contextmanager
def remote_vllm(interpreter: Path, model: str, folder: Path) -> Iterator[Remote]:
    from dualpath.cluster.vllm_launch import on_cpu

    # -P: the worker's folder, which has a vllm.py too, is not searched for modules.
    command = [interpreter.absolute(), "-P", Path(__file__).parent / "vllm_worker.py", model]
    environment = os.environ | on_cpu(1) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = folder / "vllm.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            yield Remote(process, log)
        finally:
            process.kill()
            process.wait()


def paired(ours: Engine, other: Engine, rounds: int, method: str, arguments: tuple[int, ...], seeded: bool) -> Any:
    """Returns ``(ours, vLLM's)`` milliseconds of each round; a first one, not counted, warms both up."""
    found = []
    for number in range(rounds + 1):
        seed = (random.randrange(2**30),) if seeded else ()
        order = (ours, other) if number % 2 else (other, ours)
        took = {id(engine): getattr(engine, method)(*arguments, *seed) for engine in order}
        found.append((took[id(ours)], took[id(other)]))
        print(f"\r  round {number} of {rounds} ", end="", file=sys.stderr, flush=True)
    return found[1:]


def summary(name: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    low, median, high = statistics.quantiles([theirs / mine for mine, theirs in pairs], n=4)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"\r{name:24}{median:6.2f}  ({low:.2f} to {high:.2f})  ours {mine:7.1f} ms, vLLM {theirs:7.1f} ms", flush=True
    )
    return {"ratio": median, "quartiles": [low, high], "ours_ms": mine, "vllm_ms": theirs, "pairs": pairs}


def measure(ours: Engine, other: Engine, options: argparse.Namespace) -> dict[str, Any]:
    results = {}
    print(f"{'':24} speed of ours over vLLM's (quartiles), medians of CPU time")
    for name, (cached, new) in PREFILLS.items():
        if options.only in name:
            results[name] = summary(name, paired(ours, other, options.rounds, "prefill", (cached, new), True))
    for name, (sequences, context) in DECODES.items():
        if options.only in name:
            seed = random.randrange(2**30)
            for engine in (ours, other):
                engine.open(sequences, context, seed)
            results[name] = summary(name, paired(ours, other, options.rounds, "step", (STEPS,), False))
            for engine in (ours, other):
                engine.close(sequences)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint with grouped attention; without: the demo's model, made anew")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="of vLLM's environment")
    parser.add_argument("--rounds", type=int, default=12, help="pairs of measurements of each kind (at most 60)")
    parser.add_argument("--only", default="", help="what is measured: a part of its name")
    parser.add_argument("--json", type=Path, help="also write all figures, and every pair, to this file")
    options = parser.parse_args()
    if not 3 <= options.rounds <= 60:
        parser.error(f"--rounds is {options.rounds}; it must be 3 to 60")
    with tempfile.TemporaryDirectory() as work:
        model = options.model
        if model is None:
            from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint

            model = str(make_checkpoint(Path(work) / "model", **DEMO_MODEL))
        with remote_vllm(options.python, model, Path(work)) as other:
            results = measure(Ours(model), other, options)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
