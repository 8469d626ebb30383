import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.traces.limits import TraceLimits, limited
from dualpath.traces.trajectory import Round, Trajectory


def agent(*rounds, name="a"):
    return Trajectory(id=name, rounds=rounds)


def round_(append, generate, keep=None, **other):
    return Round(append_tokens=append, generate_tokens=generate, keep_tokens=keep, **other)


def test_no_limits_leave_it_as_it_is():
    one = agent(
        round_(100, 10), round_(0, 5), round_(7, 3, keep=50, gap_s=2.5, subagents=(agent(round_(5, 1), name="c"),))
    )
    assert limited(one, TraceLimits()) == one


def test_every_count_is_divided_and_pauses_are_not():
    one = agent(round_(1600, 160), round_(320, 16, keep=1600, gap_s=1.0))
    cut = limited(one, TraceLimits(scale=16))
    assert cut.rounds == (round_(100, 10), round_(20, 1, keep=100, gap_s=1.0))


def test_a_session_ends_before_the_turn_that_is_too_long_or_one_too_many():
    one = agent(*[round_(100, 10)] * 5)
    assert len(limited(one, TraceLimits(max_context_tokens=330)).rounds) == 3
    assert len(limited(one, TraceLimits(max_context_tokens=329)).rounds) == 2
    assert len(limited(one, TraceLimits(max_turns=4)).rounds) == 4
    assert limited(one, TraceLimits(max_context_tokens=109)) is None


def test_subagents_are_cut_on_their_own():
    small, large = agent(round_(10, 1), round_(10, 1), name="s"), agent(round_(900, 1), name="l")
    one = agent(round_(10, 1, subagents=(small, large)))
    assert limited(one, TraceLimits(max_context_tokens=15)).rounds[0].subagents == (agent(round_(10, 1), name="s"),)


ROUNDS = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 900)), min_size=1, max_size=30)


@given(ROUNDS, st.floats(1, 64))
def test_rounding_does_not_add_up(lengths, scale):
    one = agent(*[round_(append, generate) for append, generate in lengths])
    cut = limited(one, TraceLimits(scale=scale))
    assert len(cut.rounds) == len(one.rounds)
    for span, theirs in zip(cut.spans(), one.spans(), strict=True):
        # Tokens can't be fewer than one each, so prompts may only be longer than their share where rounds are tiny.
        assert span.prompt_tokens >= round(theirs.prompt_tokens / scale)
    if min(min(pair) for pair in lengths) >= 2 * scale:
        assert abs(list(cut.spans())[-1].prompt_tokens - list(one.spans())[-1].prompt_tokens / scale) <= 2


def test_limits_that_can_not_be_are_refused():
    for wrong in ({"scale": 0}, {"scale": float("inf")}, {"max_turns": 0}, {"max_context_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TraceLimits(**wrong)
