"""Deadlines against a dictionary that is searched; Aborts of engines that are lost."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.deadlines import Aborts, Deadlines
from dualpath.core.request import NEVER_NS, Request
from dualpath.core.vocabulary import RequestFacts


class Live:
    """Live requests and their deadlines."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.deadlines = Deadlines(self.requests)

    def set(self, key: int, at_ns: int) -> None:
        if key not in self.requests:
            self.requests[key] = Request(RequestFacts(key, 0, 1, 0, 1))
        self.deadlines.set(self.requests[key], at_ns)

    def pop_due(self, now: int) -> list[int]:
        return [request.id for request in self.deadlines.pop_due(now)]


def test_moving_a_deadline_back_and_forth() -> None:
    live = Live()
    live.set(1, 100)
    live.set(1, 200)
    assert live.deadlines.earliest() == 200
    live.set(1, 50)
    assert live.pop_due(50) == [1]
    assert live.requests[1].deadline_ns == NEVER_NS
    assert live.deadlines.earliest() is None
    assert live.pop_due(1_000) == []
    live.set(1, 60)
    assert live.pop_due(1_000) == [1]


def test_equal_deadlines_fall_due_in_order_of_id() -> None:
    live = Live()
    for key in (3, 1, 2):
        live.set(key, 10)
    assert live.pop_due(10) == [1, 2, 3]


def test_the_heap_does_not_outgrow_what_is_live() -> None:
    live = Live()
    for key in range(10_000):
        live.set(key, 10**9 + key)
        del live.requests[key]
    assert live.deadlines.earliest() is None
    for key in range(10_000):
        live.set(-1, 10**9 - key)
    assert len(live.deadlines._heap) <= 67
    assert live.deadlines.posted()[-1] == 10**9 - 9_999


def test_a_rebuilt_heap_leaves_out_who_has_no_deadline() -> None:
    live = Live()
    live.set(1, 5)
    assert live.pop_due(5) == [1]
    for key in range(100):
        live.set(2, 1_000 - key)
    assert live.deadlines.posted() == {2: 901}


def test_what_never_comes_is_not_watched_and_can_still_be_brought_forward() -> None:
    live = Live()
    live.set(1, 5 + NEVER_NS)
    assert (live.deadlines.posted(), live.deadlines.earliest()) == ({}, None)
    live.set(1, 7)
    live.set(1, NEVER_NS + 1)
    assert live.requests[1].deadline_ns == NEVER_NS
    assert live.deadlines.earliest() is None
    live.set(1, 9)
    assert live.pop_due(9) == [1]


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
    live = Live()
    model: dict[int, int] = {}
    for what, key, at_ns in steps:
        if what == "set":
            live.set(key, at_ns)
            model[key] = at_ns
        elif what == "drop":
            live.requests.pop(key, None)
            model.pop(key, None)
        else:
            due = sorted((at, key) for key, at in model.items() if at <= at_ns)
            assert live.pop_due(at_ns) == [key for _, key in due]
            for _, gone in due:
                del model[gone]
        assert live.deadlines.earliest() == min(model.values(), default=None)
        posted = live.deadlines.posted()
        assert all(posted[key] <= at for key, at in model.items())


def test_a_lost_engine_frees_the_des_behind_it_and_no_others() -> None:
    """PEs 1 and 2 owe an answer, DEs 8 and 9 wait behind them; DE 9 waits behind nobody once it is lost itself."""
    aborts = Aborts(release_ns=10)
    for request, (prefill, decode) in enumerate([(1, 8), (2, 8), (2, 9)]):
        aborts.send(0, (prefill, request, 0))
        aborts.behind[prefill, request, 0] = decode
    assert aborts.lose(9) == []
    assert aborts.behind == {(1, 0, 0): 8, (2, 1, 0): 8}
    assert aborts.lose(1) == [(8, 0, 0)]
    assert aborts.behind == {(2, 1, 0): 8}
    assert list(aborts.in_time) == [(2, 1, 0), (2, 2, 0)]
