"""Every path through the engines gives the tokens that Transformers gives on the full prompt."""

from collections.abc import Callable

import pytest
from engine_world import BlockStore, DeBuffer, Engines, drain, enter, greedy, persist, prefill, random_tokens, turn

from dualpath.model import LayerwisePrefill, PagedDecode

pytestmark = pytest.mark.slow

Prefills = Callable[..., LayerwisePrefill]


def test_turns_of_an_agent_with_its_kv_in_storage(engines: Engines, prefill_of: Prefills) -> None:
    engine, decode, store = prefill_of(engines.model), PagedDecode(engines.model, blocks=16), BlockStore()
    context: list[int] = []
    hits = []
    for number, appended in enumerate((150, 37, 91, 5)):
        context += random_tokens(appended, seed=number)
        (output,), (hit_tokens,) = turn(engine, decode, [context], 40, store)
        assert output == engines.reference.generate(context, 40)
        context += output
        hits.append(hit_tokens)
    assert hits == [0, 128, 256, 384]  # all Full Blocks of prompt + output − 1 tokens of the turn before


def test_without_storage(engines: Engines, prefill_of: Prefills) -> None:
    context = random_tokens(230, seed=11)
    (output,), hits = turn(prefill_of(engines.model), PagedDecode(engines.model, blocks=8), [context], 60)
    assert hits == [0]
    assert output == engines.reference.generate(context, 60)


@pytest.mark.parametrize("chunk_tokens", [1, 23, 64, 100])
def test_chunked_prefill(engines: Engines, prefill_of: Prefills, chunk_tokens: int) -> None:
    engine, decode, store = prefill_of(engines.model), PagedDecode(engines.model, blocks=8), BlockStore()
    context = random_tokens(140, seed=21)
    turn(engine, decode, [context], 2, store)
    context += random_tokens(110, seed=22)
    (output,), (hit_tokens,) = turn(engine, decode, [context], 12, store, chunk_tokens)
    assert hit_tokens == 128
    assert output == engines.reference.generate(context, 12)


def test_many_requests_in_one_batch(engines: Engines, prefill_of: Prefills) -> None:
    engine, decode, store = prefill_of(engines.model), PagedDecode(engines.model, blocks=40), BlockStore()
    shared = random_tokens(200, seed=31)
    turn(engine, decode, [shared], 2, store)
    prompts = [
        shared[:150] + random_tokens(9, seed=32),
        random_tokens(70, seed=33),
        shared + random_tokens(130, seed=34),
        random_tokens(1, seed=35),
        shared[:65],
    ]
    outputs, hits = turn(engine, decode, prompts, 30, store)
    assert hits == [128, 0, 192, 0, 64]
    assert outputs == [engines.reference.generate(prompt, 30) for prompt in prompts]


def test_sequences_join_and_leave_while_others_decode(engines: Engines, prefill_of: Prefills) -> None:
    engine, decode = prefill_of(engines.model), PagedDecode(engines.model, blocks=12)
    lengths = {0: (90, 25), 1: (64, 4), 2: (130, 33)}
    prompts = {i: random_tokens(tokens, seed=40 + i) for i, (tokens, _) in lengths.items()}
    outputs: dict[int, list[int]] = {}
    for i, prompt in prompts.items():
        buffer = DeBuffer(engines.model.layout, prompt)
        (first,) = prefill(engine, [buffer], [greedy(lengths[i][1])])
        enter(decode, i, buffer, first, greedy(lengths[i][1]))
        outputs[i] = [first.token.token_id]
        for step in decode.step():
            outputs[step.sequence].append(step.draw.token_id)
    for i, tokens in drain(decode).items():
        outputs[i] += tokens
    for i, (_, max_tokens) in lengths.items():
        assert outputs[i] == engines.reference.generate(prompts[i], max_tokens)


def test_fragmented_device_memory(engines: Engines, prefill_of: Prefills) -> None:
    engine, decode, store = prefill_of(engines.model), PagedDecode(engines.model, blocks=15), BlockStore()
    for i in range(15):
        decode.admit(100 + i, prompt_tokens=60, first_token=0, sampling=greedy(2))
    for i in (0, 1, 3, 6, 7, 9, 13):
        decode.release(100 + i)
    prompt = random_tokens(260, seed=53)
    (output,), _ = turn(engine, decode, [prompt], 90, store)
    assert output == engines.reference.generate(prompt, 90)
    for i in (2, 4, 5, 8):
        decode.release(100 + i)
    assert decode.free_blocks == 11
    longer = prompt + output + random_tokens(20, seed=52)
    (output,), (hit_tokens,) = turn(engine, decode, [longer], 20, store)
    assert hit_tokens == 320
    assert output == engines.reference.generate(longer, 20)


def test_whole_context_on_the_device(engines: Engines, prefill_of: Prefills) -> None:
    engine, decode = prefill_of(engines.model, layerwise=False), PagedDecode(engines.model, blocks=12)
    store = BlockStore()
    context = random_tokens(140, seed=61)
    turn(engine, decode, [context], 2, store)
    prompts = [context + random_tokens(30, seed=62), random_tokens(40, seed=63)]
    outputs, hits = turn(engine, decode, prompts, 16, store)
    assert hits == [128, 0]
    assert outputs == [engines.reference.generate(prompt, 16) for prompt in prompts]


def test_blocks_persisted_while_decoding_are_those_of_the_end(qwen: Engines, prefill_of: Prefills) -> None:
    engine, decode = prefill_of(qwen.model), PagedDecode(qwen.model, blocks=4)
    prompt = random_tokens(100, seed=71)
    buffer = DeBuffer(qwen.model.layout, prompt)
    (first,) = prefill(engine, [buffer], [greedy(60)])
    enter(decode, 0, buffer, first, greedy(60))
    output, early = [first.token.token_id], BlockStore()
    assert decode.full_blocks(0) == 1
    while decode.full_blocks(0) < 2:
        output.append(decode.step()[0].draw.token_id)
    assert len(prompt + output) == 129  # the newest token has no KV yet
    persist(decode, 0, buffer, output, early)
    output += drain(decode)[0]
    late = BlockStore()
    persist(decode, 0, buffer, output, late)
    assert early.pages.keys() == late.pages.keys()
    assert all((early.pages[key] == late.pages[key]).all() for key in early.pages)
