"""The connector with bfloat16: no further from a plain server than two plain runs in other batches are apart."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint
from tests.vllm.pair import Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 64
ROUNDING = 2**-5
"""A step of bfloat16 between 4 and 8, where these logits are."""
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


def apart(one: Any, other: Any) -> tuple[int, float]:
    """Returns how many tokens are equal before they part, and the largest difference of their log-probabilities."""
    equal, largest = 0, 0.0
    logprobs = zip(one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], strict=True)
    for (first, second), a, b in zip(logprobs, one["token_ids"], other["token_ids"], strict=True):
        if a != b:
            break
        equal, largest = equal + 1, max(largest, abs(first - second))
    return equal, largest


def at_once(ask: Callable[[list[int]], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(ask, PROMPTS))


def test_it_is_as_near_as_two_plain_runs(pair: Pair) -> None:
    """Plain: alone and in chunks on one server, all at once and whole on the other."""
    alone = [pair.pe.complete(prompt, TOKENS) for prompt in PROMPTS]
    together = at_once(lambda prompt: pair.de.complete(prompt, TOKENS))
    plain = [apart(*both) for both in zip(alone, together, strict=True)]
    served = [pair.serve(prompt, TOKENS).choice for prompt in PROMPTS]
    served_together = [answer.choice for answer in at_once(lambda prompt: pair.serve(prompt, TOKENS))]
    ours = [apart(*both) for answers in (served, served_together) for both in zip(alone, answers, strict=True)]
    print("plain", plain, "ours", ours)
    assert max(difference for _, difference in ours) <= max(ROUNDING, *(difference for _, difference in plain))
    assert min(equal for equal, _ in ours) >= min(equal for equal, _ in plain)
