"""The connector with other kinds of model and engine: MLA, tensor parallelism, bfloat16, n-gram speculation."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint
from tests.vllm.pair import Pair
from tests.vllm.scripted_agent import BLOCK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 70
_random = random.Random(15)
PROMPTS = [[_random.randrange(10, 250) for _ in range(n)] for n in (700, 333, 128, 40)]
_MLA = {
    "architecture": "deepseek_v3",
    "seed": 3,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
"""vLLM's MLA for a CPU knows this latent alone."""
_MLA_ARGUMENTS = ["--block-size", "16", "--compilation-config", '{"custom_ops":["all","-rotary_embedding"]}']
_NGRAM = '{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3,"prompt_lookup_min":1}'
KINDS: dict[str, tuple[Any, list[str], list[str], tuple[int, int]]] = {
    "MLA": (_MLA, _MLA_ARGUMENTS, _MLA_ARGUMENTS, (1, 1)),
    "two ranks prefill": (DEMO_MODEL, ["--tensor-parallel-size", "2"], [], (2, 1)),
    "two ranks decode": (DEMO_MODEL, [], ["--tensor-parallel-size", "2"], (1, 2)),
    "n-gram speculation": (DEMO_MODEL, [], ["--speculative-config", _NGRAM], (1, 1)),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, prefill, decode, workers = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kind")
    chunks = ["--max-num-batched-tokens", "256"]
    made = Pair(make_checkpoint(folder / "model", **model), folder, [*prefill, *chunks], decode, workers)
    try:
        yield made.wait()
    finally:
        made.stop()


def test_tokens_equal_those_of_the_engine_alone(pair: Pair) -> None:
    """With a hit at the prefill engine the second time."""
    for prompt in PROMPTS:
        alone = pair.pe.complete(prompt, TOKENS)
        answer = pair.serve(prompt, TOKENS)
        assert answer.choice["token_ids"] == alone["token_ids"] == answer.told
        assert answer.choice["logprobs"]["token_logprobs"] == pytest.approx(
            alone["logprobs"]["token_logprobs"], abs=1e-4
        )
        owner = pair.owner()
        pages = pair.prefill(prompt, owner)
        again = pair.serve(prompt, TOKENS, hit=pages[: (len(prompt) - 1) // BLOCK])
        assert again.choice["token_ids"] == alone["token_ids"]
        pair.pe_agent.pool.free(owner, pages)


def test_several_at_once(pair: Pair) -> None:
    alone = [pair.pe.complete(prompt, TOKENS)["token_ids"] for prompt in PROMPTS]
    answers: dict[int, Any] = {}

    def ask(number: int) -> None:
        answers[number] = pair.serve(PROMPTS[number], TOKENS)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    assert [answers[number].choice["token_ids"] for number in range(len(PROMPTS))] == alone
    assert [answers[number].told for number in range(len(PROMPTS))] == alone


def test_generated_blocks_equal_prefilled_ones(pair: Pair) -> None:
    prompt, owner, agent = PROMPTS[1], pair.owner(), pair.de_agent
    pages = pair.prefill(prompt, owner)
    shipped = pair.ship(owner, pages)
    agent.admit(owner[0], owner, len(prompt))
    agent.fill(owner[0], shipped, len(prompt))
    with pair.decoding(prompt, owner, 200):
        assert agent.begin(owner[0]) == ""
        outs = agent.take((0, 0), 8 * BLOCK)
        assert agent.copy_out(owner[0], 5, outs[5]) == ""
    told, _ = agent.generated(owner[0])
    for block in (0, 6, 7):
        assert agent.copy_out(owner[0], block, outs[block]) == ""
    assert agent.release(owner[0]) == ""
    again = pair.owner()
    truth = pair.prefill(prompt + told, again)
    assert np.array_equal(agent.page(outs[0]), agent.page(shipped[0]))
    for block in (5, 6, 7):
        copied, computed = pair.block(agent, outs[block]), pair.block(pair.pe_agent, truth[block])
        np.testing.assert_allclose(copied, computed, atol=1e-4, rtol=1e-3)
    for holder, freed in ((agent, {(0, 0): outs, owner: shipped}), (pair.pe_agent, {owner: pages, again: truth})):
        for each, held in freed.items():
            holder.pool.free(each, held)
