"""What is generated under the grammar of a random JSON schema is valid against it, whatever the model, path and prefix.

``--schemas 1000`` asks for more of them, on every architecture.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
from llguidance import LLMatcher

from dualpath.cluster.local import Cluster

from .conftest import ARCHITECTURES, Answer, ask, cluster_config, in_cluster
from .random_schemas import random_schema

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
AT_ONCE = 8
MAX_TOKENS = 300
ENDS = (258, 256)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("--schemas", default=100)
    architectures = ARCHITECTURES if count > 100 else ("qwen3",)
    metafunc.parametrize("architecture", architectures)
    metafunc.parametrize("schemas", [range(count)], ids=[f"{count}-schemas"])


def text(token_ids: list[int]) -> str:
    """The text of a tiny checkpoint's tokens: one token a byte, in the order of the byte-level alphabet."""
    from tokenizers import decoders, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return decoders.ByteLevel().decode([letters[token] for token in token_ids if token < 256])


async def generate(cluster: Cluster, seed: int, prompt: list[int]) -> Answer:
    spaces = {} if seed % 2 else {"whitespace_flexible": False}
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(random_schema(seed)), overrides=spaces)
    more = {"grammar": grammar, "stop_token_ids": ENDS, "temperature": 2.0, "seed": seed, "ignore_eos": seed % 3 == 0}
    return await ask(cluster, prompt, MAX_TOKENS, deadline_s=300.0, **more)


@pytest.mark.parametrize("system", ["basic-layerwise", "de-only"])
def test_answers_are_valid_against_their_schemas(
    checkpoint: Callable[[str], Path], tmp_path: Path, architecture: str, schemas: range, system: str
) -> None:
    """Each schema without hits, then with: the same tokens, complete, and valid."""
    config = cluster_config(checkpoint(architecture), tmp_path, system=system)
    endless = []

    async def one(cluster: Cluster, seeds: Iterator[int]) -> None:
        for seed in seeds:
            prompt = [seed // 200, seed % 200, *(7 * i % 250 for i in range(128))]
            first, again = await generate(cluster, seed, prompt), await generate(cluster, seed, prompt)
            assert (first.cached_tokens, again.cached_tokens) == (0, 128)
            assert first.token_ids == again.token_ids, f"schema {seed}"
            if first.finish_reason == "length":
                endless.append(seed)
            else:
                checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
                jsonschema.validate(json.loads(text(first.token_ids)), random_schema(seed), format_checker=checker)

    async def work(cluster: Cluster) -> None:
        seeds = iter(schemas)
        await asyncio.gather(*(one(cluster, seeds) for _ in range(AT_ONCE)))

    in_cluster(config, work)
    assert len(endless) <= len(schemas) / 10, f"too many were cut off at {MAX_TOKENS} tokens to mean much: {endless}"
