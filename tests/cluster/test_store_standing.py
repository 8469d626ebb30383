"""Whose fault a failed call of the store is, and how long the store is left alone."""

import pytest

from dualpath.cluster.coordinator.store_health import StoreHealth
from dualpath.cluster.store_standing import (
    MAX_REFUSED_BLOCKS,
    MEMORY_S,
    READ_ONLY,
    SLOW,
    UNREACHABLE,
    StoreStanding,
    troubles_s,
)
from dualpath.spec import metrics


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def standing(clock: Clock) -> StoreStanding:
    return StoreStanding(late_away_s=5.0, clock=clock)


@pytest.mark.parametrize(("late", "took_s", "away_s"), [(False, 30.0, 1.0), (True, 2.0, 5.0)])
def test_a_store_that_fails_is_left_alone_but_for_a_trial_now_and_then(
    late: bool, took_s: float, away_s: float
) -> None:
    clock = Clock()
    store = standing(clock)
    assert store.worth_a_try()
    assert store.failed(clock.now_s - took_s, late=late)
    assert not store.worth_a_try()
    clock.now_s += away_s
    assert [store.worth_a_try() for _ in range(3)] == [True, False, False]
    clock.now_s += away_s
    assert store.worth_a_try() != late, "the longer it does not answer in time, the rarer the trials"
    clock.now_s += away_s
    assert store.worth_a_try()
    assert store.failing_s == pytest.approx(3 * away_s)
    assert store.hangs == late
    store.answered()
    assert [store.worth_a_try() for _ in range(3)] == [True] * 3
    assert store.failing_s == 0


def test_a_store_that_refuses_at_once_is_tried_every_time() -> None:
    clock = Clock()
    store = standing(clock)
    for _ in range(5):
        assert store.worth_a_try()
        assert store.failed(clock.now_s - 0.1)
    clock.now_s += 1
    assert store.failing_s == 1


def test_a_call_that_fails_among_answers_does_not_speak_against_the_store() -> None:
    clock = Clock()
    store = standing(clock)
    began_s = clock.now_s
    clock.now_s += 1
    store.answered()
    clock.now_s += 1
    assert not store.failed(began_s)
    assert store.worth_a_try() and store.failing_s == 0
    assert store.failed(clock.now_s), "nothing has been answered since"


def test_blocks_that_are_refused_one_by_one_are_their_own_fault_until_they_are_too_many() -> None:
    clock = Clock()
    store = standing(clock)
    began_s = clock.now_s - 1

    refused = [store.refused_block(began_s) for _ in range(MAX_REFUSED_BLOCKS - 1)]
    assert not any(refused) and store.worth_a_try()
    store.answered()
    assert not any(store.refused_block(began_s) for _ in range(MAX_REFUSED_BLOCKS - 1))
    assert store.refused_block(began_s)
    assert not store.worth_a_try()


def test_old_news_are_no_news() -> None:
    clock = Clock()
    store = standing(clock)
    store.failed(clock.now_s)
    clock.now_s += MEMORY_S - 1
    assert store.failing_s == MEMORY_S - 1
    clock.now_s += 1
    assert store.failing_s == 0


def test_troubles_have_names() -> None:
    clock = Clock()
    reads, writes = standing(clock), standing(clock)
    assert not any(troubles_s(reads, writes).values())
    writes.failed(clock.now_s)
    clock.now_s += 3
    reads.failed(clock.now_s)
    clock.now_s += 2
    assert troubles_s(reads, writes) == {UNREACHABLE: 2.0, SLOW: 0.0, READ_ONLY: 5.0}
    reads.failed(clock.now_s, late=True)
    assert troubles_s(reads, writes) == {UNREACHABLE: 0.0, SLOW: 2.0, READ_ONLY: 5.0}


def test_health_names_the_worst_trouble_and_who_finds_it() -> None:
    fine = dict.fromkeys((UNREACHABLE, SLOW, READ_ONLY), 0.0)
    sends = {metrics.BLOCK_IO_TROUBLE(READ_ONLY): 30.0, metrics.BLOCK_IO_TROUBLE(UNREACHABLE): 4.0}
    health = StoreHealth.of(fine, [("PE0", {}), ("DE0", sends)])
    facts = health.facts()
    assert (health.ok, facts["status"]) == (False, UNREACHABLE)
    assert str(facts["reason"]).startswith("DE0: reads fail")
    assert health.gauges()[metrics.STORE_TROUBLE(READ_ONLY)] == 30.0
    assert StoreHealth.of(fine, [("PE0", {})]).facts() == {"status": "ok"}
    assert StoreHealth.of({}, []).ok


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_an_engine_that_tells_nonsense_does_not_break_health(seconds: float) -> None:
    assert StoreHealth.of({}, [("PE0", {metrics.BLOCK_IO_TROUBLE(SLOW): seconds})]).facts() == {"status": "ok"}
