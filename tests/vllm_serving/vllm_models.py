"""The models of these tests, and a plain server and a cluster that serve the same one."""

import random
from pathlib import Path

MODELS = {
    "qwen3": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_hidden_layers": 4,
    },
    "deepseek_v3": {
        "hidden_size": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 3,
    },
}
"""With heads as large as vLLM's attention on a CPU wants them."""
VLLM_OPTIONS = {
    "qwen3": ("--max-num-batched-tokens", "512"),
    "deepseek_v3": (
        *("--max-num-batched-tokens", "512", "--block-size", "16"),
        *("--compilation-config", '{"custom_ops":["all","-rotary_embedding"]}'),
    ),
}


class Pair:
    """A plain server and a cluster that serve the same model."""

    def __init__(self, kind: str, where: Path) -> None:
        from dualpath.model.checkpoint import make_checkpoint  # not above: it needs torch

        self.kind = kind
        self.where = where
        self.model = make_checkpoint(where / "model", kind, seed=11, **MODELS[kind])  # type: ignore[arg-type]
        self.random = random.Random(5)
        self.plain = self.url = ""

    def prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(10, 250) for _ in range(tokens)]
