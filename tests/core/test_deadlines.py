"""Deadlines against a dictionary that is searched."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.deadlines import Deadlines


def test_moving_a_deadline_back_and_forth() -> None:
    deadlines: Deadlines[int] = Deadlines()
    deadlines.set(1, 100)
    deadlines.set(1, 200)
    assert deadlines.earliest() == 200
    deadlines.set(1, 50)
    assert deadlines.pop_due(50) == [1]
    assert deadlines.earliest() is None
    assert deadlines.pop_due(1_000) == []


def test_equal_deadlines_fall_due_in_key_order() -> None:
    deadlines: Deadlines[tuple[int, int, int]] = Deadlines()
    for key in ((2, 0, 0), (1, 9, 0), (1, 3, 5)):
        deadlines.set(key, 10)
    assert deadlines.pop_due(10) == [(1, 3, 5), (1, 9, 0), (2, 0, 0)]


def test_the_heap_does_not_outgrow_what_is_live() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for key in range(10_000):
        deadlines.set(key, 10**9 + key)
        deadlines.drop(key)
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= 65


operations = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.integers(0, 30)),
        st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("due"), st.just(0), st.integers(0, 30)),
    ),
    max_size=200,
)


@settings(deadline=None, derandomize=True)
@given(operations)
def test_like_a_dictionary_that_is_searched(steps: list[tuple[str, int, int]]) -> None:
    deadlines: Deadlines[int] = Deadlines()
    model: dict[int, int] = {}
    for what, key, at_ns in steps:
        if what == "set":
            deadlines.set(key, at_ns)
            model[key] = at_ns
        elif what == "drop":
            deadlines.drop(key)
            model.pop(key, None)
        else:
            due = sorted((at, key) for key, at in model.items() if at <= at_ns)
            assert deadlines.pop_due(at_ns) == [key for _, key in due]
            for _, gone in due:
                del model[gone]
        assert deadlines.earliest() == min(model.values(), default=None)
        assert sorted(deadlines.keys()) == sorted(model)
        assert len(deadlines) == len(model)
        assert (key in deadlines) == (key in model)
