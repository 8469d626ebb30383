"""The supervisor: what ends is brought back, what can not start is told, nobody is left. Children without torch."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dualpath.cluster import parts
from dualpath.cluster import supervisor as supervising
from dualpath.cluster.children import Child, started
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engine_parts import node_parts
from dualpath.cluster.parts import CAN_NOT_RUN, Part, ReplaceError
from dualpath.cluster.supervisor import MOST_FAILED_STARTS, Supervisor
from dualpath.spec.topology import Topology

WAIT_S = 20.0


def sleeper(child: Child, *, says: str = "works", exit_code: int | None = None) -> BaseProcess:
    """A child that says something, then ends or sleeps."""

    def work() -> None:
        child.telling.send(says)
        if exit_code is not None:
            os._exit(exit_code)
        signal.pause()

    return started("fork", work, (), child.name)


class Bench:
    """A supervisor and what it has told."""

    def __init__(self, *parts: Part) -> None:
        self.ended: list[str] = []
        self.hopeless: list[str] = []
        self.sweeps = 0
        self.supervisor = Supervisor(
            parts, sweep=self._sweep, on_end=lambda _, why: self.ended.append(why), on_hopeless=self.hopeless.append
        )

    async def _sweep(self) -> None:
        self.sweeps += 1

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.005)

    async def ready(self, name: str, other_than: int = 0) -> Child:
        """Wait for the part's process, a new one, and declare it ready."""
        await self.until(lambda: (child := self.supervisor.child(name)) and child.pid != other_than)
        child = self.supervisor.child(name)
        assert child is not None
        self.supervisor.ready(child.ticket)
        return child


def with_bench(work: Callable[[Bench], Awaitable[None]], *parts: Part) -> None:
    async def run() -> None:
        bench = Bench(*parts)
        try:
            await bench.supervisor.start()
            await work(bench)
        finally:
            pids = list(bench.supervisor.pids)
            await bench.supervisor.stop()
        assert bench.supervisor.pids == {}
        assert not any(is_running(pid) for pid in pids)

    asyncio.run(run())


def is_running(pid: int) -> bool:
    """A zombie, which waits for somebody to look at it, runs no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "STOP_GRACE_S", 0.1)
    monkeypatch.setattr(parts, "FIRST_PAUSE_S", 0.01)


def test_a_process_that_dies_is_told_and_brought_back() -> None:
    async def work(bench: Bench) -> None:
        first = await bench.ready("decode-0")
        await bench.until(lambda: first.step == "works")
        os.kill(first.pid, signal.SIGKILL)
        second = await bench.ready("decode-0", other_than=first.pid)
        hint = "signal SIGKILL, as the system does when memory is short"
        assert bench.ended == [f"decode-0 (pid {first.pid}) ended with {hint}: works"]
        assert second.ticket != first.ticket
        assert bench.supervisor.restarts == 1
        assert bench.hopeless == []
        assert bench.sweeps == 2

    with_bench(work, Part("decode-0", sleeper))


def test_the_end_of_a_process_is_watched_no_more() -> None:
    """Its sentinel is readable for ever: left in the loop it would spin."""

    async def work(bench: Bench) -> None:
        child = await bench.ready("a")
        assert child.process is not None
        sentinel = child.process.sentinel
        bench.supervisor.start_no_more()
        child.process.kill()
        await bench.until(lambda: bench.ended)
        assert not asyncio.get_running_loop().remove_reader(sentinel)

    with_bench(work, Part("a", sleeper))


def test_pauses_grow_up_to_a_bound_and_are_short_again_after_a_healthy_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FIRST_PAUSE_S", 0.25)
    slot = parts.Slot(Part("a", sleeper))
    bench_pauses = []
    for slot.ends_in_a_row in range(1, 10):
        bench_pauses.append(slot.pause_s())
    assert bench_pauses == [0.25, 0.5, 1, 2, 4, 8, 10, 10, 10]

    async def work(bench: Bench) -> None:
        for _ in range(3):
            child = await bench.ready("a")
            os.kill(child.pid, signal.SIGKILL)
            await bench.until(
                lambda pid=child.pid: bench.supervisor.child("a") and bench.supervisor.child("a").pid != pid
            )
        slot = bench.supervisor._slots["a"]
        assert slot.ends_in_a_row == 3
        child = await bench.ready("a")
        child.ready_s = time.monotonic() - supervising.HEALTHY_S - 1
        os.kill(child.pid, signal.SIGKILL)
        await bench.until(lambda: slot.ends_in_a_row == 1)

    monkeypatch.setattr(parts, "FIRST_PAUSE_S", 0.01)
    with_bench(work, Part("a", sleeper))


def test_who_says_that_it_can_not_run_is_hopeless_at_once() -> None:
    async def work(bench: Bench) -> None:
        await bench.until(lambda: bench.hopeless)
        assert bench.hopeless[0].endswith(f"ended with exit code 1: {CAN_NOT_RUN}no device")

    with_bench(work, Part("a", lambda child: sleeper(child, says=f"{CAN_NOT_RUN}no device", exit_code=1)))


def test_who_dies_in_each_start_is_hopeless_after_some() -> None:
    async def work(bench: Bench) -> None:
        await bench.until(lambda: bench.hopeless)
        assert len(bench.ended) == MOST_FAILED_STARTS

    with_bench(work, Part("a", lambda child: sleeper(child, exit_code=1)))


def test_a_start_that_the_system_refuses_is_tried_again() -> None:
    """As when the fork server has died in the middle of it."""
    refusals = [EOFError(), OSError("no more processes")]

    def start(child: Child) -> BaseProcess:
        if refusals:
            raise refusals.pop()
        return sleeper(child)

    async def work(bench: Bench) -> None:
        await bench.ready("a")
        assert bench.supervisor.starting() == []

    with_bench(work, Part("a", start))


def test_what_is_starting_is_said() -> None:
    async def work(bench: Bench) -> None:
        await bench.ready("a")
        other = bench.supervisor.child("b")
        assert other is not None
        await bench.until(lambda: other.step == "works")
        assert bench.supervisor.starting() == [{"name": "b", "pid": other.pid, "step": "works"}]
        os.kill(other.pid, signal.SIGKILL)
        await bench.until(lambda: bench.supervisor.child("b") is None)
        ((row),) = bench.supervisor.starting()
        assert row["pid"] is None and "starts again in" in str(row["step"])

    with_bench(work, Part("a", sleeper), Part("b", sleeper))


def test_only_its_own_children_are_killed() -> None:
    async def work(bench: Bench) -> None:
        other = subprocess.Popen(["sleep", "60"])
        try:
            child = await bench.ready("a")
            for ticket in ("", str(other.pid), str(child.pid), "forged"):
                bench.supervisor.kill(ticket)
            assert other.poll() is None and child.is_alive
            bench.supervisor.kill(child.ticket)
            assert not child.is_alive
        finally:
            other.kill()
            other.wait()

    with_bench(work, Part("a", sleeper))


# ── replacing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def replacing(first: bool, *, stays: bool = False) -> None:
    retired: list[tuple[int, bool]] = []

    async def work(bench: Bench) -> None:
        supervisor = bench.supervisor
        old = await bench.ready("a")

        async def retire(leaver: Child, new: Child | None) -> None:
            assert leaver is old
            retired.append((leaver.pid, new is not None and new.is_alive))
            if stays:
                raise ReplaceError("it has requests")
            leaver.kill()

        asked = asyncio.create_task(supervisor.replace("a", retire, first=first, timeout_s=WAIT_S))
        if stays:
            with pytest.raises(ReplaceError, match="it has requests"):
                await asked
            assert supervisor.child("a") is old and old.is_alive
            await bench.until(lambda: list(supervisor.pids) == [old.pid])
        else:
            new = await bench.ready("a", other_than=old.pid)
            await asked
            assert supervisor.child("a") is new and new.is_alive and not old.is_alive
        assert retired == [(old.pid, first)]
        assert supervisor.restarts == 0

    with_bench(work, Part("a", sleeper))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stays", [True, False])
def test_a_part_is_replaced_or_stays(first: bool, stays: bool) -> None:
    replacing(first, stays=stays)


def test_a_replacement_that_does_not_come_up_is_said_and_brought_back() -> None:
    starts = iter([None, 1, None])

    def start(child: Child) -> BaseProcess:
        return sleeper(child, exit_code=next(starts))

    async def work(bench: Bench) -> None:
        old = await bench.ready("a")

        async def retire(leaver: Child, _new: Child | None) -> None:
            leaver.kill()

        with pytest.raises(ReplaceError, match="the new a has ended"):
            await bench.supervisor.replace("a", retire, first=False, timeout_s=WAIT_S)
        await bench.ready("a", other_than=old.pid)

    with_bench(work, Part("a", start))


def test_what_does_not_serve_is_not_replaced() -> None:
    async def work(bench: Bench) -> None:
        async def retire(*_: object) -> None:
            raise AssertionError

        with pytest.raises(ReplaceError, match="a is not serving"):
            await bench.supervisor.replace("a", retire, first=True, timeout_s=WAIT_S)

    with_bench(work, Part("a", sleeper))


# ── ends with its parent ─────────────────────────────────────────────────────────────────────────────────────────────

_PARENT = """
import os, signal, sys, threading, time
from dualpath.cluster.children import Child, end_with_parent, start, started

def work(parent, late_s):
    time.sleep(late_s)
    end_with_parent(parent)
    print("child", os.getpid(), flush=True)
    signal.pause()

def main(method, late_s):
    child = Child("child")
    start(child, lambda child: started(method, work, (os.getpid(), late_s), "child")).result()
    print("started", child.pid, flush=True)
    signal.pause()

if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
"""


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_a_child_ends_with_its_parent_also_one_that_comes_too_late(tmp_path: Path, late_s: float) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    parent = subprocess.Popen([sys.executable, script, "spawn", str(late_s)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    said, pid = parent.stdout.readline().split()
    if not late_s:
        assert parent.stdout.readline() == f"child {pid}\n"
    assert said == "started" and is_running(int(pid))
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + WAIT_S
    while is_running(int(pid)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert "child" not in parent.stdout.read()
    parent.stdout.close()


def test_a_nodes_engines_are_numbered_after_those_of_the_nodes_before() -> None:
    config = ClusterConfig(model="m", store="s", topology=Topology.parse("1Px2+1P+1D"))
    names = [[engine.name for engine in node.engines] for node in node_parts(config, "tcp://127.0.0.1:9")]
    assert names == [["prefill-0", "prefill-1"], ["prefill-2"], ["decode-0"]]


def test_more_engines_than_a_host_can_have_are_refused_before_one_is_started() -> None:
    with pytest.raises(ValueError, match="60P5D is more than 64 engines on one host"):
        node_parts(ClusterConfig(model="m", store="s", topology=Topology(60, 5)), "tcp://127.0.0.1:9")
