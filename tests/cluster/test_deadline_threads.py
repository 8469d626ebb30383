"""Threads for calls that may never return."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dualpath.cluster.deadline_threads import AbandonedError, Call, DeadlineThreads, LateError

WAIT_S = 20.0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.002)


def threads_called(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def hanging(release: threading.Event, brings: object = None) -> Callable[[Call[Any]], Any]:
    def work(_: Call[Any]) -> object:
        assert release.wait(WAIT_S)
        return brings

    return work


def test_a_call_that_hangs_is_given_up_and_holds_up_nobody() -> None:
    async def run() -> None:
        release = threading.Event()
        threads = DeadlineThreads(1, "one", 0.1, most_hung=2)
        call = threads.submit(hanging(release))
        behind = threads.submit(lambda _: "done")
        with pytest.raises(LateError):
            await call.future
        assert await behind.future == "done"
        assert (threads.running, threads.hung, threads.late_calls) == (1, 1, 1)
        release.set()
        await until(lambda: threads.hung == 0)
        assert await threads.submit(lambda _: "again").future == "again"
        await until(lambda: threads_called("one") == 1)
        threads.close(WAIT_S)
        await until(lambda: threads_called("one") == 0)

    asyncio.run(run())


def test_what_a_late_call_comes_to_is_its_submitters_choice() -> None:
    async def run() -> None:
        release = threading.Event()
        threads = DeadlineThreads(1, "choice", 0.1, most_hung=1)
        assert await threads.submit(hanging(release, "in time"), if_late=lambda _: "late").future == "late"
        release.set()
        threads.close(WAIT_S)

    asyncio.run(run())


def test_when_every_thread_hangs_calls_are_refused_at_once_and_taken_again_later() -> None:
    async def run() -> None:
        release, one = threading.Event(), threading.Event()
        threads = DeadlineThreads(2, "bounded", 0.05, most_hung=3)
        calls = [threads.submit(hanging(one if n == 0 else release)) for n in range(50)]
        outcomes = await asyncio.gather(*(call.future for call in calls), return_exceptions=True)
        assert all(isinstance(outcome, LateError) for outcome in outcomes)
        assert (threads.hung, threads_called("bounded")) == (5, 5)
        refused = threads.submit(lambda _: None)
        assert refused.future.done() and isinstance(refused.future.exception(), LateError)
        one.set()
        await until(lambda: threads.hung == 4)
        assert await threads.submit(lambda _: "back").future == "back"
        release.set()
        await until(lambda: threads.hung == 0 and threads_called("bounded") <= 2)
        threads.close(WAIT_S)

    asyncio.run(run())


def test_an_abandoned_call_touches_nothing_of_the_callers() -> None:
    async def run() -> None:
        release, ended = threading.Event(), threading.Event()
        memory: list[str] = []

        def work(call: Call[None]) -> None:
            try:
                assert release.wait(WAIT_S)
                with pytest.raises(AbandonedError):
                    call.check()
                call.hand_over(lambda: memory.append("written"))
            finally:
                ended.set()

        threads = DeadlineThreads(1, "quiet", WAIT_S, most_hung=1)
        call = threads.submit(work)
        await until(lambda: threads.running == 1)
        await call.let_go()
        release.set()
        await until(ended.is_set)
        threads.close(WAIT_S)
        assert memory == []

    asyncio.run(run())


def test_who_lets_go_waits_for_a_hand_over_that_has_begun() -> None:
    async def run() -> None:
        inside, release = threading.Event(), threading.Event()
        order: list[str] = []

        def act() -> None:
            inside.set()
            assert release.wait(WAIT_S)
            order.append("handed over")

        threads = DeadlineThreads(1, "orderly", WAIT_S, most_hung=1)
        call = threads.submit(lambda call: call.hand_over(act))
        await until(inside.is_set)
        letting_go = asyncio.create_task(call.let_go())
        await asyncio.sleep(0.01)
        release.set()
        await letting_go
        order.append("let go")
        threads.close(WAIT_S)
        assert order == ["handed over", "let go"]

    asyncio.run(run())


def test_time_in_a_pause_does_not_count_and_progress_begins_anew() -> None:
    async def run() -> None:
        now_s = 0.0
        entered, release = threading.Event(), threading.Event()
        dues: list[float] = []

        def work(call: Call[str]) -> str:
            with call.paused():
                entered.set()
                assert release.wait(WAIT_S)
            dues.append(call.due_s)
            call.progress()
            dues.append(call.due_s)
            return "in time"

        threads = DeadlineThreads(1, "paused", 10.0, most_hung=1, clock=lambda: now_s)
        call = threads.submit(work)
        await until(entered.is_set)
        now_s = 1000.0
        threads._watch()
        assert threads.late_calls == 0
        release.set()
        assert await call.future == "in time"
        assert dues == [1010.0, 1010.0]
        threads.close(WAIT_S)

    asyncio.run(run())


def test_a_call_that_is_let_go_before_its_turn_is_never_begun() -> None:
    async def run() -> None:
        release = threading.Event()
        begun: list[int] = []
        threads = DeadlineThreads(1, "turns", WAIT_S, most_hung=0)
        first = threads.submit(hanging(release))
        second = threads.submit(lambda _: begun.append(2))
        third = threads.submit(lambda _: begun.append(3))
        await second.let_go()
        release.set()
        await asyncio.gather(first.future, third.future)
        threads.close(WAIT_S)
        assert begun == [3]

    asyncio.run(run())


@pytest.mark.parametrize("finish", [True, False])
def test_closing_waits_for_what_runs_and_for_the_queue_if_told_to(finish: bool) -> None:
    async def run() -> None:
        release = threading.Event()
        done: list[int] = []
        threads = DeadlineThreads(1, "closing", WAIT_S, most_hung=1)

        def work(_: Call[None]) -> None:
            assert release.wait(WAIT_S)
            done.append(len(done))

        for _ in range(3):
            threads.submit(work)
        await until(lambda: threads.running == 1)
        closing = asyncio.create_task(asyncio.to_thread(threads.close, WAIT_S, finish=finish))
        await until(lambda: threads._closed)
        release.set()
        await closing
        assert done == ([0, 1, 2] if finish else [0])

    asyncio.run(run())


def test_a_process_ends_although_a_thread_hangs() -> None:
    script = """
import asyncio, time
from dualpath.cluster.deadline_threads import DeadlineThreads, LateError
async def run():
    threads = DeadlineThreads(1, "stuck", 0.05, most_hung=0)
    call = threads.submit(lambda _: time.sleep(3600))
    try:
        await call.future
    except LateError:
        print("late")
    threads.close(3600)
asyncio.run(run())
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("late\n", "", 0)
