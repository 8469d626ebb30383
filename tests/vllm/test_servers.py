"""The connector in real vLLM servers, float32: output equals a plain server's, token for token, whatever goes wrong."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from dualpath.cluster.vllm_attachment import Drop, LayerSaved, LayersReady, StepSaved
from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint
from tests.vllm.pair import Pair
from tests.vllm.scripted_agent import BLOCK, wait_until
from tests.vllm.vllm_process import VllmProcess, connector_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKENS = 100
CANARY = 0xA5
_random = random.Random(14)
PROMPTS = {n: [_random.randrange(10, 250) for _ in range(n)] for n in (1, 63, 64, 640, 700, 1500)}
EIGHT = [[_random.randrange(10, 250) for _ in range(100 + 50 * i)] for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), **DEMO_MODEL)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    server = VllmProcess(model, tmp_path_factory.mktemp("plain") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pair(model: Path, plain: VllmProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The DE has 40 blocks: eight at once don't fit."""
    prefill = ["--max-num-batched-tokens", "256"]
    decode = ["--kv-cache-memory-bytes", str(41 << 20), "--max-model-len", "2048"]
    made = Pair(model, tmp_path_factory.mktemp("pair"), prefill, decode)
    try:
        plain.wait()
        yield made.wait()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def expected(plain: VllmProcess) -> Any:
    answers: dict[tuple[int, ...], Any] = {}

    def answer(prompt: list[int], tokens: int = TOKENS) -> Any:
        key = (tokens, *prompt)
        if key not in answers:
            answers[key] = plain.wait().complete(prompt, tokens)
        return answers[key]

    return answer


def idle(pair: Pair) -> None:
    """No block of either engine is in use, and no page of either agent."""
    for server, agent in zip(pair.servers, pair.agents, strict=True):
        wait_until(lambda server=server: server.metric("vllm:kv_cache_usage_perc") == 0, "vLLM holds no block")
        assert agent.pool is not None
        assert agent.pool.holders() == {}


@pytest.mark.parametrize("length", PROMPTS)
def test_the_answer_equals_a_plain_servers(pair: Pair, expected: Any, length: int) -> None:
    prompt = PROMPTS[length]
    answer = pair.serve(prompt, TOKENS)
    assert answer.choice["token_ids"] == expected(prompt)["token_ids"]
    assert answer.choice["logprobs"]["token_logprobs"] == pytest.approx(
        expected(prompt)["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert answer.told == answer.choice["token_ids"]
    assert answer.reason == "length"
    idle(pair)


def test_a_layer_is_saved_once_a_chunk_and_a_step_is_told_after_its_layers(pair: Pair) -> None:
    owner = pair.owner()
    pages = pair.prefill(PROMPTS[700], owner)
    told = [each for each in pair.pe_agent.messages(LayerSaved) if each.saved[0].owner == owner]
    assert [(each.layer, each.saved[0].first_block, each.saved[0].blocks) for each in told] == [
        (layer, first, blocks) for first, blocks in ((0, 4), (4, 4), (8, 3)) for layer in range(8)
    ]
    steps = [each.computed for each in pair.pe_agent.messages(StepSaved) if each.computed[0][0] == owner]
    assert steps == [[(owner, 256)], [(owner, 512)], [(owner, 700)]]
    pair.pe_agent.pool.free(owner, pages)


def test_hit_layers_are_taken_one_by_one_as_they_come(pair: Pair, expected: Any) -> None:
    prompt, first, second = PROMPTS[700], pair.owner(), pair.owner()
    whole = pair.prefill(prompt, first)
    agent = pair.pe_agent
    pages = agent.take(second, len(prompt))
    for page in pages:
        agent.page(page)[:] = CANARY
    agent.expect(second, pages, 576, len(prompt), ready=False)
    ours = {"owner": list(second), "hit_tokens": 576}
    answer: list[Any] = []
    thread = threading.Thread(target=lambda: answer.append(pair.pe.complete(prompt, 1, ours)))
    thread.start()
    layer_bytes = agent.hello.engine.layout.layer_block_bytes[0]
    for layer in range(8):
        part = slice(layer * layer_bytes, (layer + 1) * layer_bytes)
        for source, page in zip(whole[:9], pages[:9], strict=True):
            agent.page(page)[part] = agent.page(source)[part]
        agent.tell(LayersReady(second, layer + 1))
        agent.wait_for(
            lambda each, layer=layer: (
                isinstance(each, LayerSaved) and each.layer == layer and each.saved[0].owner == second
            ),
            f"layer {layer} is saved",
        )
    agent.wait_saved(second, len(prompt))
    thread.join(60)
    assert answer[0]["token_ids"] == expected(prompt)["token_ids"][:1]
    assert answer[0]["usage"]["prompt_tokens_details"]["cached_tokens"] == 576
    for source, page in zip(whole, pages, strict=True):
        np.testing.assert_allclose(pair.block(agent, page), pair.block(agent, source), atol=1e-4, rtol=1e-3)
    agent.pool.free(first, whole)
    agent.pool.free(second, pages)
    idle(pair)


def test_eight_at_once_in_too_little_memory(pair: Pair, expected: Any) -> None:
    """vLLM preempts some of them: what was loaded is computed again."""
    wanted = [expected(prompt, 200)["token_ids"] for prompt in EIGHT]
    before = pair.de.metric("vllm:num_preemptions_total")
    answers: dict[int, Any] = {}
    all_are_shipped = threading.Barrier(8, timeout=100)

    def ask(number: int) -> None:
        answers[number] = pair.serve(EIGHT[number], 200, before_decoding=all_are_shipped.wait)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert [answers[number].choice["token_ids"] for number in range(8)] == wanted
    assert [answers[number].told for number in range(8)] == wanted
    assert pair.de.metric("vllm:num_preemptions_total") > before
    idle(pair)


def test_generated_blocks_are_copied_out_as_they_fill_and_at_the_end(pair: Pair, expected: Any) -> None:
    """They equal what the prefill engine computes of the same tokens."""
    prompt, owner, tokens = PROMPTS[700], pair.owner(), 300
    pages = pair.prefill(prompt, owner)
    shipped = pair.ship(owner, pages)
    agent = pair.de_agent
    agent.admit(owner[0], owner, len(prompt))
    filled = agent.fill(owner[0], shipped, len(prompt))
    outs = agent.take((0, 0), 16 * BLOCK)
    with pair.decoding(prompt, owner, tokens) as answer:
        assert agent.answer(filled) == ""
        assert agent.begin(owner[0]) == ""
        assert agent.copy_out(owner[0], 10, outs[10]) == ""  # while it decodes
    told, _ = agent.generated(owner[0])
    assert told == answer.choice["token_ids"] == expected(prompt, tokens)["token_ids"]
    whole = prompt + told
    for block in (0, 9, 11, 12, 13, 14):
        assert agent.copy_out(owner[0], block, outs[block]) == ""
    assert "not on the device" in agent.copy_out(owner[0], 15, outs[15])  # its last token has no KV
    assert agent.release(owner[0]) == ""
    assert "no sequence" in agent.copy_out(owner[0], 0, outs[0])

    again = pair.owner()
    truth = pair.prefill(whole, again)
    for block in (0, 9):
        assert np.array_equal(agent.page(outs[block]), pair.pe_agent.page(pages[block]))
    for block in (10, 11, 12, 13, 14):
        copied, computed = pair.block(agent, outs[block]), pair.block(pair.pe_agent, truth[block])
        np.testing.assert_allclose(copied, computed, atol=1e-4, rtol=1e-3)
    for holder, freed in ((agent, {(0, 0): outs, owner: shipped}), (pair.pe_agent, {owner: pages, again: truth})):
        for each, held in freed.items():
            holder.pool.free(each, held)
    idle(pair)


def test_blocks_of_a_preempted_sequence_are_copied_out_right(pair: Pair, expected: Any) -> None:
    """Two that don't fit together: one is preempted while copies of its blocks are asked for."""
    prompts = [PROMPTS[1500], EIGHT[7] + EIGHT[6]]
    tokens, before = 400, pair.de.metric("vllm:num_preemptions_total")
    agent = pair.de_agent
    owners = [pair.owner(), pair.owner()]
    results: dict[int, Any] = {}
    both_are_shipped = threading.Barrier(2, timeout=100)

    def run(number: int) -> None:
        prompt, owner, sequence = prompts[number], owners[number], owners[number][0]
        pages = pair.prefill(prompt, owner)
        shipped = pair.ship(owner, pages)
        both_are_shipped.wait()
        agent.admit(sequence, owner, len(prompt))
        filled = agent.fill(sequence, shipped, len(prompt))
        with pair.decoding(prompt, owner, tokens) as answer:
            assert agent.answer(filled) == ""
            assert agent.begin(sequence) == ""
            agent.pool.free(owner, shipped)
            outs = agent.take(owner, (len(prompt) + tokens) // BLOCK * BLOCK)
            last = (len(prompt) + tokens - 1) // BLOCK
            calls = {block: agent.begin_call(_copy_out(sequence, block, outs[block])) for block in range(last)}
        told, _ = agent.generated(sequence)
        assert [agent.answer(call) for call in calls.values()] == [""] * last
        assert agent.release(sequence) == ""
        results[number] = (answer.choice["token_ids"], told, outs[:last])
        pair.pe_agent.pool.free(owner, pages)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert pair.de.metric("vllm:num_preemptions_total") > before
    for number, prompt in enumerate(prompts):
        answered, told, outs = results[number]
        assert answered == told == expected(prompt, tokens)["token_ids"]
        again = pair.owner()
        truth = pair.prefill(prompt + told, again)
        for out, page in zip(outs, truth, strict=False):
            np.testing.assert_allclose(pair.block(agent, out), pair.block(pair.pe_agent, page), atol=1e-4, rtol=1e-3)
        pair.pe_agent.pool.free(again, truth)
        agent.pool.free(owners[number], agent_pages(agent, owners[number]))
    idle(pair)


def test_the_same_prompt_again_takes_what_vllm_has_itself(pair: Pair, expected: Any) -> None:
    prompt = PROMPTS[700]
    for _ in range(2):
        assert pair.serve(prompt, TOKENS).choice["token_ids"] == expected(prompt)["token_ids"]
    idle(pair)


def test_no_admit_and_vllm_computes_itself(pair: Pair, expected: Any) -> None:
    before = pair.de.metric("vllm:generation_tokens_total")
    prompt, owner = EIGHT[2], pair.owner()
    with pair.decoding(prompt, owner, 400) as answer:
        wait_until(lambda: pair.de.metric("vllm:generation_tokens_total") > before, "it computes")
        late = pair.de_agent.admit(owner[0], owner, len(prompt))
        assert "does not wait" in pair.de_agent.answer(late)
    assert answer.choice["token_ids"] == expected(prompt, 400)["token_ids"]
    idle(pair)


def test_a_wrong_prompt_length_is_declined(pair: Pair, expected: Any) -> None:
    prompt, owner = EIGHT[1], pair.owner()
    admitted = pair.de_agent.admit(owner[0], owner, len(prompt))
    ours = {"owner": list(owner), "prompt_tokens": len(prompt) + 1}
    assert pair.de.complete(prompt, TOKENS, ours)["token_ids"] == expected(prompt)["token_ids"]
    assert pair.de_agent.answer(admitted) != ""
    idle(pair)


def test_a_stop_before_vllm_has_the_request(pair: Pair, expected: Any) -> None:
    prompt, owner = EIGHT[3], pair.owner()
    calls = [pair.de_agent.admit(owner[0], owner, len(prompt)), pair.de_agent.fill(owner[0], [0], len(prompt))]
    pair.de_agent.stop_sequence(owner[0])
    assert all("stopped" in pair.de_agent.answer(call) for call in calls)
    assert pair.de_agent.release(owner[0]) == ""
    with pair.decoding(prompt, owner, TOKENS) as answer:
        pass
    assert answer.choice["token_ids"] == expected(prompt)["token_ids"]
    idle(pair)


def test_a_client_that_leaves_in_the_middle_of_a_load(pair: Pair, expected: Any) -> None:
    prompt, owner = PROMPTS[700], pair.owner()
    agent = pair.de_agent
    admitted = agent.admit(owner[0], owner, len(prompt))
    client = pair.de.open(prompt, TOKENS, {"owner": list(owner), "prompt_tokens": len(prompt)})
    assert agent.answer(admitted) == ""
    client.close()
    page = agent.take(owner, BLOCK)

    def refused() -> bool:
        return agent.answer(agent.fill(owner[0], page, BLOCK)) != ""

    wait_until(refused, "the load is over")
    assert agent.release(owner[0]) == ""
    agent.pool.free(owner, page)
    idle(pair)
    assert pair.serve(prompt, TOKENS).choice["token_ids"] == expected(prompt)["token_ids"]


def test_a_client_that_leaves_while_it_decodes(pair: Pair) -> None:
    prompt, owner = EIGHT[5], pair.owner()
    pages = pair.prefill(prompt, owner)
    shipped, agent = pair.ship(owner, pages), pair.de_agent
    agent.admit(owner[0], owner, len(prompt))
    filled = agent.fill(owner[0], shipped, len(prompt))
    client = pair.de.open(prompt, 1500, {"owner": list(owner), "prompt_tokens": len(prompt)})
    assert agent.answer(filled) == ""
    assert agent.begin(owner[0]) == ""
    while b"data:" not in client.recv(4096):
        pass
    client.close()
    told, reason = agent.generated(owner[0])
    assert reason == "abort"
    assert len(told) < 1500
    assert agent.copy_out(owner[0], 0, shipped[0]) == ""  # its blocks are held
    assert agent.release(owner[0]) == ""
    agent.pool.free(owner, shipped)
    pair.pe_agent.pool.free(owner, pages)
    idle(pair)


def test_an_agent_that_dies_in_the_middle_of_a_load_and_comes_back(pair: Pair, expected: Any) -> None:
    prompt, owner = PROMPTS[700], pair.owner()
    agent = pair.de_agent
    admitted = agent.admit(owner[0], owner, len(prompt))
    with pair.decoding(prompt, owner, TOKENS) as answer:
        assert agent.answer(admitted) == ""
        pages = agent.take(owner, len(prompt))
        agent.fill(owner[0], pages[:5], 5 * BLOCK)
        agent.stop()
    assert answer.choice["token_ids"] == expected(prompt)["token_ids"]
    wait_until(lambda: pair.de.metric("vllm:kv_cache_usage_perc") == 0, "vLLM holds no block")
    agent.start().wait_attached()
    assert pair.serve(prompt, TOKENS).choice["token_ids"] == expected(prompt)["token_ids"]
    idle(pair)


def test_an_agent_that_dies_while_its_sequence_decodes_gives_the_blocks_back(pair: Pair, expected: Any) -> None:
    prompt, owner = EIGHT[6], pair.owner()
    pages = pair.prefill(prompt, owner)
    shipped, agent = pair.ship(owner, pages), pair.de_agent
    agent.admit(owner[0], owner, len(prompt))
    agent.fill(owner[0], shipped, len(prompt))
    with pair.decoding(prompt, owner, 400) as answer:
        assert agent.begin(owner[0]) == ""
        agent.stop()
    assert answer.choice["token_ids"] == expected(prompt, 400)["token_ids"]
    wait_until(lambda: pair.de.metric("vllm:kv_cache_usage_perc") == 0, "vLLM holds no block")
    agent.start().wait_attached()
    pair.pe_agent.pool.free(owner, pages)
    idle(pair)


def test_a_prompt_dropped_in_the_middle_is_written_no_more(pair: Pair) -> None:
    prompt, owner, agent = PROMPTS[1500], pair.owner(), pair.pe_agent
    pages = agent.take(owner, len(prompt))
    agent.expect(owner, pages, 0, len(prompt))
    thread = threading.Thread(target=pair.pe.complete, args=(prompt, 1, {"owner": list(owner), "hit_tokens": 0}))
    thread.start()
    agent.wait_for(lambda each: isinstance(each, LayerSaved) and each.saved[0].owner == owner, "a layer is saved")
    agent.drop(owner)
    for page in pages:
        agent.page(page)[:] = CANARY
    thread.join(60)
    assert all((agent.page(page) == CANARY).all() for page in pages)
    assert not any((owner, len(prompt)) in each.computed for each in agent.messages(StepSaved))
    agent.pool.free(owner, pages)
    idle(pair)


def test_a_prompt_dropped_while_a_step_waits_for_its_layers(pair: Pair, expected: Any) -> None:
    """vLLM computes what does not come; another prompt in the same batch is right."""
    prompt, owner, agent = PROMPTS[640], pair.owner(), pair.pe_agent
    pages = agent.take(owner, len(prompt))
    for page in pages:
        agent.page(page)[:] = CANARY
    agent.expect(owner, pages, 576, len(prompt), ready=False)
    agent.tell(LayersReady(owner, 3))
    answers: list[Any] = []
    ours = {"owner": list(owner), "hit_tokens": 576}
    thread = threading.Thread(target=lambda: answers.append(pair.pe.complete(prompt, 1, ours)))
    thread.start()
    agent.wait_for(
        lambda each: isinstance(each, LayerSaved) and each.layer == 2 and each.saved[0].owner == owner,
        "layer 2 is saved",
    )
    agent.drop(owner)
    for page in pages:
        agent.page(page)[:] = CANARY
    thread.join(60)
    assert answers[0]["token_ids"] == expected(prompt)["token_ids"][:1]
    assert all((agent.page(page) == CANARY).all() for page in pages)
    agent.pool.free(owner, pages)
    idle(pair)


def test_a_prefill_agent_that_dies_while_a_step_waits(pair: Pair, expected: Any) -> None:
    prompt, owner, agent = PROMPTS[640], pair.owner(), pair.pe_agent
    pages = agent.take(owner, len(prompt))
    agent.expect(owner, pages, 576, len(prompt), ready=False)
    agent.tell(LayersReady(owner, 1))
    answers: list[Any] = []
    ours = {"owner": list(owner), "hit_tokens": 576}
    thread = threading.Thread(target=lambda: answers.append(pair.pe.complete(prompt, 1, ours)))
    thread.start()
    agent.wait_for(lambda each: isinstance(each, LayerSaved) and each.saved[0].owner == owner, "a layer is saved")
    agent.stop()
    thread.join(60)
    assert answers[0]["token_ids"] == expected(prompt)["token_ids"][:1]
    agent.start().wait_attached()
    assert pair.serve(prompt, TOKENS).choice["token_ids"] == expected(prompt)["token_ids"]
    idle(pair)


def test_dropping_what_is_not_known_is_answered(pair: Pair) -> None:
    pair.pe_agent.drop(pair.owner())
    owner = pair.owner()
    pair.pe_agent.tell(Drop(owner))
    pages = pair.pe_agent.take(owner, 64)
    assert pair.pe.complete(PROMPTS[64], 1, {"owner": list(owner), "hit_tokens": 0})["token_ids"]
    assert not any(each.saved[0].owner == owner for each in pair.pe_agent.messages(LayerSaved))
    pair.pe_agent.pool.free(owner, pages)


def test_calls_about_nothing_are_answered_with_an_error(pair: Pair) -> None:
    agent = pair.de_agent
    assert "no sequence" in agent.answer(agent.fill(999, [0], 64))
    assert agent.release(999) == ""


def test_without_our_parameters_it_is_a_plain_server(pair: Pair, expected: Any) -> None:
    for server in pair.servers:
        assert server.complete(EIGHT[0], TOKENS)["token_ids"] == expected(EIGHT[0])["token_ids"]
    idle(pair)


def test_a_server_that_can_not_take_part_does_not_start(model: Path, pair: Pair, tmp_path: Path) -> None:
    refused = connector_config("prefill", tmp_path / "agent", 1)
    said = VllmProcess(model, tmp_path / "log", "--enable-prefix-caching", transfer=refused).wait_end()
    assert "start it with --no-enable-prefix-caching" in said


def _copy_out(sequence: int, block: int, page: int) -> Any:
    from dualpath.cluster.attachment import CopyOut

    return lambda call: CopyOut(call, sequence, block, page)


def agent_pages(agent: Any, owner: tuple[int, int]) -> list[int]:
    return sorted(agent.pool._held[owner])
