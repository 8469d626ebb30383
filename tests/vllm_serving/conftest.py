"""What these tests serve: real vLLM servers, in the environment that `make setup-vllm` makes."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .servers import TOOLS, VLLM_PYTHON, cluster, plain_vllm

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
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "num_hidden_layers": 3,
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


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if not VLLM_PYTHON.exists():
        pytest.skip("there is no .venv-vllm: make setup-vllm")
    made = Pair(request.param, tmp_path_factory.mktemp(request.param))
    options = VLLM_OPTIONS[made.kind]
    with ExitStack() as stack:
        dtype = ("--dtype", "float32", *TOOLS)
        block = () if "--block-size" in options else ("--block-size", "64")
        made.plain = stack.enter_context(plain_vllm(made.model, made.where / "plain.log", *dtype, *block, *options))
        rotation = ("--system", "tests.vllm_serving.rotation:ROTATION", "--dtype", "float32")
        made.url, _ = stack.enter_context(cluster(made.model, made.where, *rotation, vllm=(*TOOLS, *options)))
        yield made
