"""Processes, workers and shared cores under virtual time."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.prediction.cpu import Cpu
from dualpath.prediction.processes import Condition, Processes, Signal, Steps, Workers, all_of
from dualpath.sim.events import Events


def run_all(events: Events) -> None:
    while len(events):
        events.step()


def test_a_process_waits_and_returns():
    events = Events()
    processes = Processes(events)

    def inner() -> Steps:
        yield processes.after(5)
        return "value"

    def outer() -> Steps:
        value = yield processes.start(inner())
        yield processes.until(3)  # has passed
        return value, events.now

    ended = processes.start(outer())
    assert not ended.is_set
    run_all(events)
    assert ended.value == ("value", 5)


def test_a_signal_wakes_in_the_order_of_waiting():
    signal, order = Signal(), []
    for name in "abc":
        signal.then(lambda value, name=name: order.append((name, value)))
    signal.set(7)
    assert order == [("a", 7), ("b", 7), ("c", 7)]


def test_all_of_waits_for_the_last_and_for_nothing():
    first, second = Signal(), Signal()
    second.set()
    both = all_of([first, second])
    assert not both.is_set
    first.set()
    assert both.is_set
    assert all_of([]).is_set


def test_workers_take_jobs_in_order_as_many_as_there_are_threads():
    events = Events()
    processes = Processes(events)
    workers, begun = Workers(processes, 2), []

    def job(name: str) -> Steps:
        begun.append((name, events.now))
        yield processes.after(10)
        return name

    ended = [workers.submit(job(name)) for name in "abc"]
    run_all(events)
    assert begun == [("a", 0), ("b", 0), ("c", 10)]
    assert [signal.value for signal in ended] == ["a", "b", "c"]


def test_a_condition_wakes_only_those_it_holds_for():
    condition, reached = Condition(), []
    for level in (1, 2):
        condition.when(lambda level=level: len(reached) >= level).then(lambda _, level=level: None)
    low = condition.when(lambda: len(reached) >= 1)
    high = condition.when(lambda: len(reached) >= 2)
    reached.append(0)
    condition.changed()
    assert (low.is_set, high.is_set) == (True, False)
    reached.append(0)
    condition.changed()
    assert high.is_set


def ends_of(
    cores: float, slowdown: float, tasks: list[tuple[int, float]], slowness: float = 1.0
) -> tuple[list[int], float]:
    """When tasks (ns, threads) that begin together end, and the core time they used."""
    events = Events()
    cpu = Cpu(events, cores, slowdown, slowness)
    ends = [0] * len(tasks)

    def note(number: int) -> None:
        ends[number] = events.now

    for number, (ns, threads) in enumerate(tasks):
        cpu.run(ns, threads).then(lambda _, number=number: note(number))
    run_all(events)
    return ends, cpu.busy_core_ns


@pytest.mark.parametrize(
    ("cores", "slowdown", "tasks", "ends"),
    [
        (2, 1.5, [(1000, 1.0)], [1000]),  # alone: nobody to be slowed down by
        (1, 1.0, [(1000, 1.0), (1000, 1.0)], [2000, 2000]),
        (2, 1.0, [(1000, 1.0), (3000, 1.0)], [1000, 3000]),
        (2, 1.5, [(1000, 1.0), (1000, 1.0)], [1500, 1500]),
        (2, 1.0, [(1000, 1.0)] * 3, [1500] * 3),
        (1, 1.0, [(1000, 1.0), (3000, 1.0)], [2000, 4000]),
        (2, 1.0, [(1000, 2.0), (1000, 2.0)], [2000, 2000]),  # two threads each
    ],
)
def test_cores_are_shared_equally(cores: int, slowdown: float, tasks: list[tuple[int, float]], ends: list[int]):
    assert ends_of(cores, slowdown, tasks)[0] == pytest.approx(ends, abs=3)


def test_a_slow_machine_is_slow_for_a_lone_task_too():
    assert ends_of(2, 1.5, [(1000, 1.0)], slowness=1.2)[0] == pytest.approx([1200], abs=3)
    assert ends_of(2, 1.5, [(1000, 1.0)] * 2, slowness=1.2)[0] == pytest.approx([1800] * 2, abs=3)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(100, 10**7), st.sampled_from([0.5, 1.0, 2.0])), min_size=1))
def test_no_core_time_is_lost_or_made(cores: int, tasks: list[tuple[int, float]]):
    wide_enough = [(ns, min(threads, cores)) for ns, threads in tasks]
    ends, used_ns = ends_of(cores, 1.0, wide_enough)
    assert used_ns == pytest.approx(sum(ns * threads for ns, threads in wide_enough), rel=1e-3, abs=100 * len(tasks))
    assert max(ends) >= max(ns for ns, _ in wide_enough) - 3


def test_a_thread_that_has_slept_runs_at_once_and_the_others_share_what_it_leaves():
    events = Events()
    cpu = Cpu(events, 1, 1.0, 1.0)
    ends: dict[str, int] = {}

    def note(name: str) -> Callable[[object], None]:
        return lambda _: ends.__setitem__(name, events.now)

    cpu.run(10_000_000).then(note("computing"))
    cpu.run_light(1_000_000).then(note("light"))
    cpu.run_light(2_000_000, threads=0.5).then(note("half a thread"))
    cpu.run_light(4_000_000).then(note("more than a slice"))
    run_all(events)
    assert cpu.busy_core_ns == pytest.approx(16_000_000, rel=1e-3)  # nothing is lost
    assert ends["light"] < ends["half a thread"] < 4_000_000 < ends["more than a slice"] < ends["computing"]


@given(st.lists(st.tuples(st.integers(100, 10**7), st.booleans()), min_size=1, max_size=20))
def test_both_lots_together_use_the_cores_up(tasks: list[tuple[int, bool]]):
    events = Events()
    cpu = Cpu(events, 2, 1.0, 1.0)
    for ns, light in tasks:
        (cpu.run_light if light else cpu.run)(ns)
    run_all(events)
    assert cpu.busy_core_ns == pytest.approx(sum(ns for ns, _ in tasks), rel=1e-3, abs=100 * len(tasks))


def test_busy_cores_take_more_from_each_other_while_one_decodes():
    events = Events()
    cpu = Cpu(events, 2, 2.0, 1.0, side_by_side=1.25)
    ends: dict[str, int] = {}
    for name, run, ns in (("step", cpu.run_decode, 1_000_000), ("prefill", cpu.run, 2_000_000)):
        run(ns).then(lambda _, name=name: ends.__setitem__(name, events.now))
    run_all(events)
    assert ends["step"] == pytest.approx(2_000_000, rel=1e-3)
    assert ends["prefill"] == pytest.approx(2_000_000 + 1_000_000, rel=1e-3)  # the rest alone
    cpu.run(1_000_000).then(lambda _: ends.__setitem__("one", events.now))
    cpu.run(1_000_000).then(lambda _: ends.__setitem__("other", events.now))
    run_all(events)
    assert ends["other"] - ends["prefill"] == pytest.approx(1_250_000, rel=1e-3)


def test_nothing_to_do_takes_no_time():
    cpu = Cpu(Events(), 1, 1.0, 1.0)
    assert cpu.run(0).is_set and cpu.run_decode(0).is_set
