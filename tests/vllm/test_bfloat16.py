"""The connector with bfloat16: no further from a plain server than two plain runs in other batches are apart."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint
from tests.vllm.pair import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 64
_random = random.Random(16)
PROMPTS = [[_random.randrange(10, 250) for _ in range(n)] for n in (700, 333, 520, 450, 600, 290)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder, dtype = tmp_path_factory.mktemp("bfloat16"), ["--dtype", "bfloat16"]
    model = make_checkpoint(folder / "model", **DEMO_MODEL)
    made = Pair(model, folder, [*dtype, "--max-num-batched-tokens", "256"], dtype)
    try:
        yield made.wait()
    finally:
        made.stop()


def apart(one: Any, other: Any) -> float:
    """Returns the largest difference of log-probabilities up to where the tokens part."""
    largest = 0.0
    for index, (a, b) in enumerate(zip(one["token_ids"], other["token_ids"], strict=True)):
        if a != b:
            break
        probabilities = (each["logprobs"]["token_logprobs"][index] for each in (one, other))
        first, second = probabilities
        largest = max(largest, abs(first - second))
    return largest


def test_it_is_as_near_as_two_plain_runs(pair: Pair) -> None:
    """The prefill engine computes in chunks of 256 tokens, the decode engine in one."""
    plain, ours = [], []
    for prompt in PROMPTS:
        chunked, whole = pair.pe.complete(prompt, TOKENS), pair.de.complete(prompt, TOKENS)
        answer = pair.serve(prompt, TOKENS)
        plain.append(apart(chunked, whole))
        ours.append(min(apart(answer.choice, chunked), apart(answer.choice, whole)))
    print("plain", plain, "ours", ours)
    assert max(plain) > 0
    assert max(ours) <= max(plain)
