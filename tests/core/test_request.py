"""The transition table: complete, closed, and drawn as it is."""

import pytest

from dualpath.core.request import (
    ACCEPTS,
    TRANSITIONS,
    Event,
    IllegalTransition,
    Request,
    State,
    hbm_blocks,
    hit_blocks,
    prompt_blocks,
    render_table,
)
from dualpath.core.vocabulary import RequestFacts

FACTS = RequestFacts(request=7, attempt=2, prompt_tokens=129, hit_tokens=128, max_new_tokens=63)


def test_every_live_state_can_fail_and_be_cancelled_and_no_terminal_one_moves() -> None:
    for state in State:
        if state.is_terminal:
            assert TRANSITIONS[state] == {}
        else:
            assert TRANSITIONS[state][Event.FAIL] is State.FAILED
            assert TRANSITIONS[state][Event.CANCEL] is State.CANCELLED
    assert [state for state in State if state.is_terminal] == [State.FINISHED, State.FAILED, State.CANCELLED]


def test_every_state_is_reached_and_a_terminal_one_can_be_reached_from_each() -> None:
    reached = {State.QUEUED}
    for _ in State:
        reached |= {target for state in reached for target in TRANSITIONS[state].values()}
    assert reached == set(State)


def test_an_illegal_move_raises_and_changes_nothing() -> None:
    request = Request(FACTS)
    with pytest.raises(IllegalTransition, match="request 7 attempt 2: finish"):
        request.move(Event.FINISH)
    assert request.state is State.QUEUED


def test_inputs_are_news_only_in_live_states() -> None:
    assert all(not state.is_terminal for states in ACCEPTS.values() for state in states)


def test_blocks_of_a_request() -> None:
    assert (hit_blocks(FACTS), prompt_blocks(FACTS), hbm_blocks(FACTS)) == (2, 3, 3)
    request = Request(FACTS)
    assert (request.hit_blocks, request.prompt_blocks, request.hbm_blocks) == (2, 3, 3)


def test_the_next_attempt_starts_from_its_own_facts_and_keeps_the_request() -> None:
    request = Request(FACTS)
    request.deadline_ns, request.prefill_engine, request.prepared = 5, 3, True
    request.begin_attempt(RequestFacts(request=7, attempt=3, prompt_tokens=200, hit_tokens=64, max_new_tokens=1))
    assert (request.key, request.attempt, request.deadline_ns) == ((7, 3), 3, 5)
    assert (request.hit_blocks, request.prompt_blocks, request.hbm_blocks) == (1, 4, 4)
    assert request.prefill_engine is None and not request.prepared


def test_a_request_says_what_it_is_and_has() -> None:
    text = repr(Request(FACTS))
    for part in ("Request(", "id=7", "state=<State.QUEUED", "hit_blocks=2", "commanded=()"):
        assert part in text


def test_the_diagram_has_every_transition_once() -> None:
    lines = render_table().splitlines()
    assert lines[:3] == ["```mermaid", "stateDiagram-v2", "    [*] --> queued"]
    assert lines[-1] == "```"
    drawn = [line.strip() for line in lines[3:-1]]
    moves = [
        f"{state.value} --> {target.value}: {event.value}"
        for state in State
        for event, target in TRANSITIONS[state].items()
    ]
    ends = [f"{state.value} --> [*]" for state in State if state.is_terminal]
    assert drawn == moves + ends
