"""The scheduler's half of a prefill engine, with fakes of vLLM's records."""

from dualpath.vllm.prefill_scheduler import PrefillScheduler
from dualpath.vllm.steps import Chunk
from tests.vllm.fakes import FakeRequest, more, new

OWNER = (3, 1)


def ask(prompt_tokens: int, hit_tokens: int) -> FakeRequest:
    ours = {"owner": list(OWNER), "hit_tokens": hit_tokens}
    return FakeRequest("r", list(range(prompt_tokens)), {"dualpath": ours})


def test_a_hit_is_loaded_in_the_step_itself_and_never_the_whole_prompt() -> None:
    scheduler = PrefillScheduler(64)
    assert scheduler.matched(ask(200, 128), 0) == (128, False)
    assert scheduler.matched(ask(200, 128), 64) == (64, False)
    assert scheduler.matched(ask(128, 128), 0) == (64, False)
    assert scheduler.matched(ask(200, 0), 0) == (0, False)


def test_an_engine_that_can_not_take_hits_computes_whole_prompts() -> None:
    scheduler, request = PrefillScheduler(64, takes_hits=False), ask(200, 128)
    assert scheduler.matched(request, 0) == (0, False)
    scheduler.allocated(request, 0)
    assert scheduler.step(new(request, 200, [1, 2, 3, 4])).chunks == [Chunk(OWNER, 0, [1, 2, 3, 4], 200, [])]


def test_requests_that_are_not_ours_are_left_alone() -> None:
    scheduler = PrefillScheduler(64)
    for parameters in (None, {}, {"dualpath": 3}, {"dualpath": {"owner": [1], "hit_tokens": 64}}, {"other": {}}):
        request = FakeRequest("r", [1] * 200, parameters)
        assert scheduler.matched(request, 0) == (0, False)
        scheduler.allocated(request, 0)
        assert scheduler.step(new(request, 200, [0, 1, 2, 3])).chunks == []
        scheduler.finished(request)


def test_chunks_name_every_block_that_they_touch() -> None:
    scheduler, request = PrefillScheduler(64), ask(300, 64)
    scheduler.allocated(request, 64)
    request.num_computed_tokens = 64
    assert scheduler.step(new(request, 100, [10, 11, 12])).chunks == [Chunk(OWNER, 1, [11, 12], 164, [10])]
    request.num_computed_tokens = 164
    assert scheduler.step(more(request, 100, [13, 14])).chunks == [Chunk(OWNER, 2, [12, 13, 14], 264, [])]
    request.num_computed_tokens = 264
    assert scheduler.step(more(request, 36)).chunks == [Chunk(OWNER, 4, [14], 300, [])]


def test_small_device_blocks_make_up_a_block() -> None:
    scheduler, request = PrefillScheduler(16), ask(150, 64)
    scheduler.allocated(request, 64)
    request.num_computed_tokens = 64
    blocks = list(range(20, 30))
    assert scheduler.step(new(request, 86, blocks)).chunks == [Chunk(OWNER, 1, blocks[4:], 150, blocks[:4])]


def test_a_preempted_prompt_loads_its_hit_again() -> None:
    scheduler, request = PrefillScheduler(64), ask(200, 64)
    scheduler.allocated(request, 64)
    request.num_computed_tokens = 64
    scheduler.step(new(request, 64, [1, 2]))
    request.num_preemptions, request.num_computed_tokens = 1, 0
    assert scheduler.matched(request, 0) == (64, False)
    scheduler.allocated(request, 64)
    request.num_computed_tokens = 64
    assert scheduler.step(more(request, 136, [5, 6, 7, 8], resumed=True)).chunks == [
        Chunk(OWNER, 1, [6, 7, 8], 200, [5])
    ]


def test_a_token_after_the_prompt_is_no_chunk() -> None:
    scheduler, request = PrefillScheduler(64), ask(64, 0)
    scheduler.allocated(request, 0)
    scheduler.step(new(request, 64, [1]))
    request.num_computed_tokens = 64
    assert scheduler.step(more(request, 1, [2])).chunks == []
