"""Measures what a draw costs: plain, with penalties, with min_p, with a grammar; alone and in a decode step.

    python benchmarks/sampling.py [--model DIR] [--threads 1] [--draws-only] [--json FILE]

Without a model it uses the tiny checkpoint. *draw* is one call for a batch of rows of random logits of the model's
vocabulary. *step* is a decode step of sequences with 100 tokens of context. Each setting is paired with the plain one:
calls alternate, and the median difference is shown, so that a change of the machine's speed hits both. *first* is what
the first grammar of an engine costs (tokenizer), *compile* one grammar, *copy* a known one.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llguidance import LLMatcher
from rich.console import Console
from rich.table import Table

from dualpath.model import Grammars, LoadedModel, PagedDecode, TokenConstraints, make_checkpoint
from dualpath.model.sampling import TokenDraw, draw
from dualpath.spec.sampling import SamplingParams, token_history

BATCHES = (1, 8)
PAIRS = 100
STEP_PAIRS = 25
CONTEXT_TOKENS = 100
TEXT = {"type": "string", "minLength": 1000}
GRAMMAR = LLMatcher.grammar_from_json_schema(json.dumps({"type": "array", "items": TEXT, "minItems": 100}))
TOOLS = {"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(100)}}
LONG: dict[str, Any] = {"max_tokens": 10_000, "temperature": 0.7, "ignore_eos": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "min_p": {"min_p": 0.05},
    "top_k 20, top_p 0.95": {"top_k": 20, "top_p": 0.95},
    "presence + frequency": {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.1},
    "logit_bias, bad_words": {"logit_bias": ((5, 1.0), (6, -1.0)), "bad_words": ((7,), (8, 9))},
    "grammar": {"grammar": GRAMMAR},
}


class Bench:
    def __init__(self, model: LoadedModel, path: Path) -> None:
        self.model = model
        self.grammars = Grammars(path, model.vocab_size, model.eos_token_ids)
        self.prompt = [(17 * i) % model.vocab_size for i in range(CONTEXT_TOKENS)]

    def params(self, more: dict[str, Any]) -> SamplingParams:
        return SamplingParams(**LONG, stop_token_ids=self.model.eos_token_ids, **more)

    def constraints(self, params: SamplingParams) -> TokenConstraints | None:
        if not params.is_constrained:
            return None
        matcher = self.grammars.matcher(params.grammar) if params.grammar else None
        return TokenConstraints(params, token_history(params, self.prompt, []), matcher)

    def drawing(self, batch: int, more: dict[str, Any]) -> Callable[[], None]:
        """Returns a function that draws for a batch; each call goes on where the last one ended."""
        params = [self.params(more)] * batch
        held = [self.constraints(one) for one in params]
        logits = torch.randn(batch, self.model.vocab_size, generator=torch.Generator().manual_seed(1))
        index = 0

        def once() -> None:
            nonlocal index
            for row, rules in zip(draw(logits, params, [index] * batch, held), held, strict=True):
                assert isinstance(row, TokenDraw), row
                if rules is not None:
                    rules.accept(row.token_id)
            index += 1

        return once

    def stepping(self, batch: int, more: dict[str, Any]) -> Callable[[], None]:
        longest = CONTEXT_TOKENS + STEP_PAIRS + 50
        decode = PagedDecode(self.model, batch * -(-longest // 64))
        params = SamplingParams(**(LONG | {"max_tokens": STEP_PAIRS + 40}), stop_token_ids=(), **more)
        for sequence in range(batch):
            rules = self.constraints(params)
            decode.admit(sequence, CONTEXT_TOKENS, 5, params, constraints=rules)
            decode.join(sequence)

        def once() -> None:
            assert all(output.draw is not None for output in decode.step())

        return once


def seconds(call: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def paired(plain: Callable[[], None], other: Callable[[], None], count: int) -> tuple[float, float]:
    """Returns the plain call's median time, and the median difference of the other one's."""
    for call in (plain, other) * 5:
        call()
    pairs = [(seconds(plain), seconds(other)) for _ in range(count)]
    return statistics.median(p for p, _ in pairs), statistics.median(o - p for p, o in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws-only", action="store_true", help="a large model's steps may take minutes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or make_checkpoint(Path(folder) / "tiny", "qwen3")
        bench = Bench(LoadedModel.load(path, threads=arguments.threads), path)
        first_s = seconds(lambda: bench.grammars.matcher(GRAMMAR))
        tools = LLMatcher.grammar_from_json_schema(json.dumps(TOOLS))
        results: dict[str, Any] = {
            "vocabulary": bench.model.vocab_size,
            "first_ms": first_s * 1e3,
            "compile_ms": seconds(lambda: bench.grammars.matcher(tools)) * 1e3,
            "copy_ms": seconds(lambda: bench.grammars.matcher(tools)) * 1e3,
        }
        kinds = {"draw": (bench.drawing, PAIRS)} | (
            {} if arguments.draws_only else {"step": (bench.stepping, STEP_PAIRS)}
        )
        for kind, (make, count) in kinds.items():
            for batch in BATCHES:
                for name, more in SETTINGS.items():
                    plain, added = paired(make(batch, {}), make(batch, more), count)
                    results[f"{kind} {batch} {name}"] = {"plain_ms": plain * 1e3, "added_ms": added * 1e3}
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def show(results: dict[str, Any]) -> None:
    costs = {key: value for key, value in results.items() if not isinstance(value, dict)}
    Console().print(", ".join(f"{key} {value:.4g}" for key, value in costs.items()))
    columns = [
        f"{kind} {batch}" for kind in ("draw", "step") for batch in BATCHES if f"{kind} {batch} plain" in results
    ]
    table = Table("setting", *(f"{column}, ms" for column in columns))
    for name in SETTINGS:
        cells = (results[f"{column} {name}"] for column in columns)
        table.add_row(name, *(f"{c['plain_ms']:.2f} {c['added_ms']:+.2f}" for c in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
