"""Tiny checkpoints of every architecture, made once a session; the models and their references, loaded once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # where there is no torch, these tests are skipped, not their collection broken
    from engine_world import Engines

    from dualpath.model import LayerwisePrefill, LoadedModel

WINDOWED = ("gpt_oss", "mimo_v2_flash", "gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2", "mistral")
"""With sliding windows of 50 tokens; gpt_oss and mimo_v2_flash with sinks, gemma2 with capped scores, too."""
SEEDS = {"gemma2": 4}
"""Of a checkpoint's weights, where two tokens of a reference are too close with the usual seed."""
ARCHITECTURES = ("qwen2", "qwen3", "llama", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", *WINDOWED)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from dualpath.model import make_checkpoint

    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_checkpoint(
                tmp_path_factory.mktemp(architecture), architecture, seed=SEEDS.get(architecture, 3)
            )
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def engines_of(checkpoint: Callable[[str], Path]) -> "Callable[[str], Engines]":
    import torch
    from engine_world import Engines, Reference
    from transformers import AutoModelForCausalLM

    from dualpath.model import LoadedModel

    made: dict[str, Engines] = {}

    def make(architecture: str) -> Engines:
        if architecture not in made:
            path = checkpoint(architecture)
            network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            made[architecture] = Engines(architecture, LoadedModel.load(path), Reference(network))
        return made[architecture]

    return make


@pytest.fixture(params=ARCHITECTURES)
def engines(request: pytest.FixtureRequest, engines_of: "Callable[[str], Engines]") -> "Engines":
    return engines_of(request.param)


@pytest.fixture
def qwen(engines_of: "Callable[[str], Engines]") -> "Engines":
    return engines_of("qwen3")


@pytest.fixture
def prefill_of() -> "Iterator[Callable[..., LayerwisePrefill]]":
    """Makes prefills and closes them."""
    from dualpath.model import LayerwisePrefill

    made: list[LayerwisePrefill] = []

    def make(model: "LoadedModel", **options: object) -> LayerwisePrefill:
        made.append(LayerwisePrefill(model, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
