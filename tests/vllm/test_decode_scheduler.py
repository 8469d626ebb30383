"""The scheduler's half of a decode engine, with fakes of vLLM's records."""

from typing import Any

import pytest

from dualpath.vllm.decode_scheduler import DecodeScheduler
from dualpath.vllm.steps import DecodeStep, End, Load, Progress
from tests.vllm.fakes import FakeBlocks, FakeConnectorOutput, FakeOutput, FakeRequest, more, new

OWNER = (3, 1)


def ask(prompt_tokens: int = 100, name: str = "r", **fields: Any) -> FakeRequest:
    ours = {"owner": list(OWNER), "prompt_tokens": prompt_tokens}
    return FakeRequest(name, list(range(prompt_tokens)), {"dualpath": ours}, **fields)


def loaded(prompt_tokens: int = 100, blocks: int = 2) -> tuple[DecodeScheduler, FakeRequest]:
    """A request that is about to decode."""
    scheduler, request = DecodeScheduler(), ask(prompt_tokens)
    scheduler.allocated(request, FakeBlocks(list(range(blocks))), prompt_tokens)
    scheduler.step(FakeOutput())
    scheduler.received(FakeConnectorOutput({"r"}))
    request.num_computed_tokens = prompt_tokens - 1
    return scheduler, request


def test_the_whole_prompt_is_loaded_between_steps() -> None:
    scheduler, request = DecodeScheduler(), ask()
    assert scheduler.matched(request, 0) == (100, True)
    assert scheduler.matched(request, 64) == (36, True)
    scheduler.allocated(request, FakeBlocks([7, 8]), 36)
    assert scheduler.step(FakeOutput()) == DecodeStep(loads=[Load("r", OWNER, 64, [7, 8])])


def test_a_request_loads_once() -> None:
    scheduler, request = loaded()
    assert scheduler.matched(request, 0) == (0, False)
    assert scheduler.matched(ask(name="second"), 0) == (0, False)
    request.num_preemptions = 1
    assert scheduler.matched(request, 0) == (0, False)


@pytest.mark.parametrize(
    "request_", [ask(prompt_tokens=90), ask(mm_features=[1]), ask(lora_request=1), ask(prompt_embeds=1)]
)
def test_what_can_not_be_loaded_is_declined(request_: FakeRequest) -> None:
    scheduler = DecodeScheduler()
    if request_.num_prompt_tokens == 90:
        request_.all_token_ids.append(1)
        request_.num_prompt_tokens = 91
    assert scheduler.matched(request_, 0) == (0, False)
    scheduler.allocated(request_, FakeBlocks([7, 8]), 0)
    assert scheduler.step(FakeOutput()) == DecodeStep(declined=[OWNER])
    assert not scheduler.finished(request_, [7, 8])


def test_tokens_are_told_when_a_block_is_full_and_at_the_end() -> None:
    scheduler, request = loaded(100)
    first = DecodeStep(grown=[(OWNER, 0, [0, 1])], progress=[Progress(OWNER, 99, [])])
    assert scheduler.step(new(request, 1, [0, 1])) == first
    told = []
    for token in range(1000, 1070):
        request.num_computed_tokens = request.num_tokens
        request.all_token_ids.append(token)
        told += scheduler.step(more(request, 1)).progress
    assert told == [Progress(OWNER, 128, list(range(1000, 1029)))]
    assert scheduler.finished(request, [0, 1, 2])
    assert scheduler.step(FakeOutput()).ended == [
        End("r", OWNER, True, "length", list(range(1029, 1070)), 169, [0, 1, 2])
    ]


def test_steps_that_run_do_not_count_as_computed() -> None:
    """vLLM schedules a step ahead: 129 tokens are computed soon, but only 128 are known."""
    scheduler, request = loaded(127)
    request.all_token_ids.append(1000)
    request.num_computed_tokens = 129
    assert scheduler.step(more(request, 1)).progress == [Progress(OWNER, 127, [1000])]


def test_a_preemption_takes_all_device_blocks() -> None:
    scheduler, request = loaded(100)
    request.all_token_ids += range(1000, 1060)
    request.num_computed_tokens = 159
    assert scheduler.step(more(request, 1)).progress == [Progress(OWNER, 159, list(range(1000, 1060)))]
    request.num_preemptions, request.num_computed_tokens = 1, 0
    assert scheduler.step(FakeOutput()).preempted == [OWNER]
    assert scheduler.step(FakeOutput()) == DecodeStep()
    step = scheduler.step(more(request, 128, [5, 6], resumed=True))
    assert step == DecodeStep(grown=[(OWNER, 0, [5, 6])])
    request.num_computed_tokens = 128
    step = scheduler.step(more(request, 32, [9]))
    assert step == DecodeStep(grown=[(OWNER, 2, [9])], progress=[Progress(OWNER, 128, [])])


def test_a_request_that_ends_while_it_loads_is_not_held() -> None:
    scheduler, request = DecodeScheduler(), ask(reason="abort")
    scheduler.allocated(request, FakeBlocks([7, 8]), 100)
    scheduler.step(FakeOutput())
    assert not scheduler.finished(request, [7, 8])
    assert scheduler.step(FakeOutput()).ended == [End("r", OWNER, False, "abort")]
    scheduler.received(FakeConnectorOutput({"r"}))
