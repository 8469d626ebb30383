"""The clock: order, ties, and that it never goes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.lab.sim.events import Events


@given(st.lists(st.integers(0, 20), max_size=40))
def test_events_come_in_order_of_time_then_of_posting(times: "list[int]") -> None:
    events = Events()
    seen: list[tuple[int, int]] = []
    for number, time_ns in enumerate(times):
        events.at(time_ns, lambda argument: seen.append((events.now, argument)), number)
    while len(events):
        events.step()
    assert seen == sorted((time_ns, number) for number, time_ns in enumerate(times))
    assert events.posted == len(times)


def test_what_is_late_happens_now() -> None:
    events = Events()
    seen: list[int] = []
    events.at(10, lambda _: events.at(3, lambda _: seen.append(events.now)))
    events.at(12, lambda _: seen.append(events.now))
    while len(events):
        events.step()
    assert seen == [10, 12]


def test_nothing_left_to_happen() -> None:
    with pytest.raises(IndexError):
        Events().step()
