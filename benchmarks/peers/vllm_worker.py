"""The vLLM side of vllm_engine.py: an engine without a server, in vLLM's own environment, told by lines what to do."""

import json
import os
import random
import sys
import time
from pathlib import Path

VOCABULARY = 256
BLOCK_TOKENS = 64
DECODES = {
    "decode 1 x 100": (1, 100),
    "decode 4 x 100": (4, 100),
    "decode 8 x 100": (8, 100),
    "decode 4 x 3000": (4, 3000),
    "decode 12 x 4000": (12, 4000),
}
"""(sequences, tokens of context)."""


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


def blocks_of(context: int) -> int:
    """Blocks of a sequence with room for what is generated while it is measured."""
    return -(-context // BLOCK_TOKENS) + 8


class Vllm:
    """The same on vLLM's engine, in its own environment."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        most = max(sequences * blocks_of(context) for sequences, context in DECODES.values())
        config = json.loads(Path(model, "config.json").read_text())
        heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        block_bytes = BLOCK_TOKENS * layers * 2 * heads * config["head_dim"] * 4
        self._engine = LLM(
            model=model,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            block_size=BLOCK_TOKENS,
            max_model_len=8192,
            max_num_seqs=16,
            max_num_batched_tokens=8192,
            kv_cache_memory_bytes=(most + 100) * block_bytes,
            enable_prefix_caching=True,
            async_scheduling=False,
        ).llm_engine
        self._cached = 0
        self._ids: list[str] = []

    def prefill(self, cached: int, new: int, seed: int) -> float:
        prefix = tokens(cached, seed=cached)
        if cached and self._cached != cached:
            self._run(prefix)
            self._cached = cached
        return self._run(prefix + tokens(new, seed))

    def _run(self, prompt: list[int]) -> float:
        self._add("prompt", prompt, max_tokens=1)
        began_ns = time.process_time_ns()
        steps = 0
        while self._engine.has_unfinished_requests():
            self._engine.step()
            steps += 1
        assert steps == 1, f"a prompt of {len(prompt)} tokens took {steps} steps"
        return (time.process_time_ns() - began_ns) / 1e6

    def _add(self, name: str, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return str(self._engine.add_request(name, {"prompt_token_ids": prompt}, params))

    def open(self, sequences: int, context: int, seed: int) -> None:
        self._cached = 0  # their blocks may take the place of the cached ones
        room = blocks_of(context) * BLOCK_TOKENS - context
        for i in range(sequences):
            self._ids.append(self._add(f"sequence-{i}", tokens(context, seed + i), room))
            self._engine.step()

    def step(self, count: int) -> float:
        began_ns = time.process_time_ns()
        for _ in range(count):
            outputs = self._engine.step()
        taken_ns = time.process_time_ns() - began_ns
        assert len(outputs) == len(self._ids) and not any(output.finished for output in outputs)
        return taken_ns / 1e6 / count

    def close(self, sequences: int) -> None:
        del sequences
        self._engine.abort_request(self._ids, internal=True)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        self._ids = []


def serve(model: str) -> None:
    """Answer each line of stdin, ``[method, arguments]``, by a line of stdout. vLLM's own words go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine = Vllm(model)
    answers.write("null\n")
    for line in sys.stdin:
        method, arguments = json.loads(line)
        answers.write(json.dumps(getattr(engine, method)(*arguments)) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
