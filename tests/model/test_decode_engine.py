"""Decode engine: lengths and reasons to finish, what is refused, and threads that come and go during a step."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from engine_world import DeBuffer, Engines, drain, enter, greedy, prefill, random_tokens

from dualpath.model import LayerwisePrefill, OutOfBlocksError, PagedDecode

Prefills = Callable[..., LayerwisePrefill]


def entered(engines: Engines, prefill_of: Prefills, decode: PagedDecode, sequence: int, **params: object) -> list[int]:
    """A sequence of 70 prompt tokens that has joined; its reference tokens."""
    prompt = random_tokens(70, seed=sequence)
    sampling = greedy(**{"max_tokens": 20} | params)
    buffer = DeBuffer(engines.model.layout, prompt)
    (first,) = prefill(prefill_of(engines.model), [buffer], [sampling])
    enter(decode, sequence, buffer, first, sampling)
    return engines.reference.generate(prompt, 20)


def test_a_stop_token_ends_a_sequence_and_is_part_of_it(qwen: Engines, prefill_of: Prefills) -> None:
    decode = PagedDecode(qwen.model, blocks=4)
    expected = entered(qwen, prefill_of, PagedDecode(qwen.model, blocks=4), 5)
    stop = expected[6]
    entered(qwen, prefill_of, decode, 5, stop_token_ids=(stop,))
    outputs = []
    while step := decode.step():
        outputs += step
    assert [o.draw.token_id for o in outputs] == expected[1 : expected.index(stop) + 1]
    assert [o.finish_reason for o in outputs][-1] == "stop"
    assert {o.finish_reason for o in outputs[:-1]} <= {None}
    assert decode.step() == []


def test_stop_tokens_wait_for_min_tokens(qwen: Engines, prefill_of: Prefills) -> None:
    expected = entered(qwen, prefill_of, PagedDecode(qwen.model, blocks=4), 5)
    decode = PagedDecode(qwen.model, blocks=4)
    entered(qwen, prefill_of, decode, 5, stop_token_ids=(expected[2],), min_tokens=5)
    outputs = []
    while step := decode.step():
        outputs += step
    tokens = [o.draw.token_id for o in outputs]
    assert tokens[0] == expected[1]
    assert expected[2] not in tokens[:4]  # tokens 1 to 4; number 0 came from the prefill


def test_a_first_token_may_be_all_there_is(qwen: Engines) -> None:
    decode = PagedDecode(qwen.model, blocks=4)
    assert decode.admit(1, 64, first_token=7, sampling=greedy(1)) == "length"
    assert decode.admit(2, 64, first_token=7, sampling=greedy(5, stop_token_ids=(7,))) == "stop"
    assert decode.join(1) == "length"
    assert decode.join(2) == "stop"
    assert decode.step() == []
    assert decode.full_blocks(1) == 1
    decode.release(1)
    decode.release(2)
    assert decode.free_blocks == 4


def test_a_retried_attempt_goes_on_counting(qwen: Engines, prefill_of: Prefills) -> None:
    """The lost attempt gave 8 of 20 tokens; they are now part of the prompt."""
    lost = PagedDecode(qwen.model, blocks=4)
    expected = entered(qwen, prefill_of, lost, 3)
    prompt = random_tokens(70, seed=3) + expected[:8]
    buffer = DeBuffer(qwen.model.layout, prompt)
    (first,) = prefill(prefill_of(qwen.model), [buffer], [greedy(20)])
    decode = PagedDecode(qwen.model, blocks=2)
    assert decode.blocks_for(len(prompt), greedy(20), generated_so_far=8) == 2
    decode.admit(0, len(prompt), first.token.token_id, greedy(20), generated_so_far=8)
    for block, page in enumerate(buffer.pages):
        decode.fill_block(0, block, page.reshape(-1), min(64, len(prompt) - 64 * block))
    decode.join(0)
    assert [first.token.token_id, *drain(decode)[0]] == expected[8:]


def test_blocks_are_taken_for_all_a_sequence_may_become(qwen: Engines) -> None:
    decode = PagedDecode(qwen.model, blocks=5)
    decode.admit(1, 100, first_token=0, sampling=greedy(28))
    assert decode.free_blocks == 3
    with pytest.raises(OutOfBlocksError, match="4 blocks asked for, 3 of 5 are free"):
        decode.admit(2, 100, first_token=0, sampling=greedy(93))
    decode.admit(2, 100, first_token=0, sampling=greedy(92))
    assert decode.free_blocks == 0
    decode.release(1)
    decode.release(2)
    assert decode.free_blocks == 5


def test_wrong_use_is_refused(qwen: Engines, prefill_of: Prefills) -> None:
    decode = PagedDecode(qwen.model, blocks=8)
    page = np.zeros(qwen.model.layout.full_block_bytes, dtype=np.uint8)
    decode.admit(1, 70, first_token=0, sampling=greedy(5))
    with pytest.raises(ValueError, match="admitted already"):
        decode.admit(1, 70, first_token=0, sampling=greedy(5))
    with pytest.raises(ValueError, match="generated_so_far=5"):
        decode.admit(2, 70, first_token=0, sampling=greedy(5), generated_so_far=5)
    with pytest.raises(ValueError, match="the model takes 4096"):
        decode.admit(2, 4090, first_token=0, sampling=greedy(50))
    for block, tokens in ((1, 64), (2, 1), (-1, 1), (0, 0), (0, 65)):
        with pytest.raises(ValueError, match="not in a prompt of 70 tokens"):
            decode.fill_block(1, block, page, tokens)
    for wrong in (page[:-1], page.view(np.float32), np.zeros(2 * page.nbytes, dtype=np.uint8)[::2]):
        with pytest.raises(ValueError, match=r"contiguous uint8 bytes"):
            decode.fill_block(1, 0, wrong, 64)
    for block in (1, -1):
        with pytest.raises(ValueError, match="not one of its 1 Full Blocks"):
            decode.copy_block(1, block, page)
    decode.join(1)
    with pytest.raises(ValueError, match="can't be filled any more"):
        decode.fill_block(1, 0, page, 64)
    for call in (decode.join, decode.release, decode.full_blocks):
        with pytest.raises(KeyError, match="sequence 9 is not admitted"):
            call(9)


def test_damaged_kv_ends_its_own_sequence_only(qwen: Engines, prefill_of: Prefills) -> None:
    decode = PagedDecode(qwen.model, blocks=8)
    expected = entered(qwen, prefill_of, decode, 1)
    damaged = np.full(qwen.model.layout.full_block_bytes, 0xFF, dtype=np.uint8)
    decode.admit(2, 64, first_token=0, sampling=greedy(20))
    decode.fill_block(2, 0, damaged, 64)
    decode.join(2)
    good, bad = decode.step()
    assert good.draw.token_id == expected[1] and good.error is None
    assert bad.sequence == 2 and bad.draw is None and isinstance(bad.error, FloatingPointError)
    assert drain(decode)[1] == expected[2:]


def test_release_waits_for_the_step_and_is_refused_during_a_copy(qwen: Engines, prefill_of: Prefills) -> None:
    decode = PagedDecode(qwen.model, blocks=8)
    entered(qwen, prefill_of, decode, 1)
    expected = entered(qwen, prefill_of, decode, 2)
    inside, go_on, released = threading.Event(), threading.Event(), threading.Event()

    def hold(module: object, arguments: object) -> None:
        inside.set()
        assert go_on.wait(20)

    def release() -> None:
        decode.release(1)
        released.set()

    hook = qwen.model.network.get_decoder().layers[1].register_forward_pre_hook(hold)
    results: list[object] = []
    stepping = threading.Thread(target=lambda: results.append(decode.step()))
    stepping.start()
    assert inside.wait(20)
    releasing = threading.Thread(target=release)
    releasing.start()
    assert not released.wait(0.05)
    with pytest.raises(RuntimeError, match="a step is in progress"):
        decode.step()
    decode.admit(3, 64, first_token=0, sampling=greedy(4))
    decode.release(3)  # takes no part in the step, so there is nothing to wait for
    go_on.set()
    stepping.join(20)
    releasing.join(20)
    hook.remove()
    assert released.is_set()
    assert drain(decode)[2] == expected[2:]
    with decode._copying(2), pytest.raises(RuntimeError, match="1 copies of its blocks are in progress"):
        decode.release(2)
    decode.release(2)
    assert decode.free_blocks == 8
