"""Copies through a NIC's loop: bytes, class, deadlines, and memory that comes and goes. Here UCX copies by itself."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import psutil
import pytest
from channel_pair import WAIT_S, random_bytes, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualpath.core.traffic_classes import CLASSES
from dualpath.core.vocabulary import TrafficClass
from dualpath.transfer.transports.nixl import agent
from dualpath.transfer.transports.nixl.agent import LIBRARIES, Agent
from dualpath.transfer.transports.nixl.loop import Loop, LoopError

pytestmark = pytest.mark.skipif(not any(map(find_spec, LIBRARIES)), reason="NIXL (dualpath[nixl]) is not installed")

HALF_BYTES = 1 << 20


@pytest.fixture(params=["", "tcp"], ids=["shared memory", "tcp"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
    made = Loop()
    yield made
    made.close()


class Memories:
    """A host's and a device's, registered."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.host, self.device = random_bytes(HALF_BYTES, 1), random_bytes(HALF_BYTES, 2)
        self.numbers = [loop.register(one.ctypes.data, one.nbytes) for one in (self.host, self.device)]

    def copy(self, to_device: bool, pieces: list[tuple[int, int, int]]) -> None:
        host_at, device_at = self.host.ctypes.data, self.device.ctypes.data
        self.loop.copy(to_device, [(host_at + near, device_at + far, n) for near, far, n in pieces])

    def works(self) -> None:
        self.host[:] = random_bytes(HALF_BYTES, 3)
        self.copy(True, [(0, 0, HALF_BYTES)])
        assert np.array_equal(self.host, self.device)


@st.composite
def piece_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Pieces of the host and of the device, apart from each other on both sides, in any order."""
    sizes = draw(st.lists(st.integers(1, 6000), min_size=1, max_size=150))
    near_order, far_order = (draw(st.permutations(range(len(sizes)))) for _ in range(2))
    gaps = draw(st.lists(st.integers(0, 900), min_size=len(sizes), max_size=len(sizes)))

    def places(order: list[int]) -> list[int]:
        at, found = 0, [0] * len(sizes)
        for index in order:
            at += gaps[index]
            found[index] = at
            at += sizes[index]
        return found

    return list(zip(places(near_order), places(far_order), sizes, strict=True))


def test_bytes_arrive_for_any_pieces_and_nothing_else_changes(loop: Loop) -> None:
    memories = Memories(loop)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(pieces=piece_lists(), to_device=st.booleans(), seed=st.integers(0, 2**31))
    def check(pieces: list[tuple[int, int, int]], to_device: bool, seed: int) -> None:
        memories.host[:], memories.device[:] = random_bytes(HALF_BYTES, seed), random_bytes(HALF_BYTES, seed + 1)
        host, device = memories.host.copy(), memories.device.copy()
        for near, far, n_bytes in pieces:
            if to_device:
                device[far : far + n_bytes] = host[near : near + n_bytes]
            else:
                host[near : near + n_bytes] = device[far : far + n_bytes]
        memories.copy(to_device, pieces)
        assert np.array_equal(memories.host, host) and np.array_equal(memories.device, device)

    check()


def test_threads_copy_at_once(loop: Loop) -> None:
    memories = Memories(loop)
    memories.host[:], memories.device[:] = random_bytes(HALF_BYTES, 5), 0
    part = HALF_BYTES // 64
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: memories.copy(True, [(i * part, i * part, part)]), range(64)))
    assert np.array_equal(memories.host, memories.device)


@pytest.mark.parametrize("traffic_class", list(TrafficClass))
def test_ucx_is_given_the_class(traffic_class: TrafficClass, monkeypatch: pytest.MonkeyPatch) -> None:
    given_options: list[str] = []
    make = agent._make

    def noted(options: str) -> object:
        given_options.append(options)
        return make(options)

    monkeypatch.setattr(agent, "_make", noted)
    Loop(traffic_class).close()
    marks = CLASSES[traffic_class]
    (options,) = given_options
    assert {f"IB_SL={marks.service_level}", f"IB_TRAFFIC_CLASS={marks.tos}"} < set(options.split(","))


def test_kvs_class_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    classes: list[TrafficClass] = []
    init = Agent.__init__

    def noted(self: Agent, traffic_class: TrafficClass, *more: object, **others: object) -> None:
        classes.append(traffic_class)
        init(self, traffic_class, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Agent, "__init__", noted)
    Loop().close()
    assert classes == [TrafficClass.LOW]


@pytest.mark.skipif("UCX_TLS" in os.environ, reason="UCX_TLS chooses")
def test_no_port_is_opened() -> None:
    """UCX lets in whoever comes."""
    before = listening()
    loop = Loop()
    Memories(loop).works()
    assert listening() == before
    loop.close()


def listening() -> set[object]:
    return {one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}


def test_memory_comes_and_goes(loop: Loop) -> None:
    for _ in range(3):
        memories = Memories(loop)
        memories.works()
        for number in memories.numbers:
            loop.deregister(number)
    with pytest.raises(LoopError, match="NIXL: "):
        memories.works()


def test_a_loop_that_has_failed_says_why_and_copies_nothing_more(loop: Loop) -> None:
    memories, strange = Memories(loop), np.zeros(100, np.uint8)
    with pytest.raises(LoopError, match="NIXL: ") as first:
        loop.copy(True, [(strange.ctypes.data, memories.device.ctypes.data, 100)])
    with pytest.raises(LoopError) as then:
        memories.works()
    assert str(then.value) == str(first.value)
    loop.deregister(memories.numbers[0])  # nothing touches it any more


def test_a_copy_that_misses_its_deadline_ends_the_loop_and_what_could_touch_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop(deadline_s=0.05)
    memories = Memories(loop)
    destroyed: list[bool] = []
    destroy = Agent.destroy
    monkeypatch.setattr(Agent, "is_done", lambda *_: False)
    monkeypatch.setattr(Agent, "destroy", lambda self: destroyed.append(destroy(self)) or destroyed[-1])
    with pytest.raises(LoopError, match=r"a copy was not done within 0\.05 s$"):
        memories.copy(True, [(0, 0, 10), (50, 50, 10)])
    assert destroyed == [True]
    with pytest.raises(LoopError, match="was not done"):
        memories.copy(True, [(0, 0, 10)])
    loop.close()
    assert destroyed == [True]


def test_an_agent_that_lives_on_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(deadline_s=0.01)
    memories = Memories(loop)
    monkeypatch.setattr(Agent, "is_done", lambda *_: False)
    destroy = Agent.destroy
    monkeypatch.setattr(Agent, "destroy", lambda self: destroy(self) and False)
    with pytest.raises(LoopError, match="may touch memory until this process ends"):
        memories.copy(True, [(0, 0, 10)])
    with pytest.raises(LoopError, match="may touch memory until this process ends"):
        loop.deregister(memories.numbers[0])  # its memory may not be freed


def test_memory_is_not_let_go_while_a_copy_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, arrived = Loop(), threading.Event()
    memories = Memories(loop)
    is_done = Agent.is_done
    monkeypatch.setattr(Agent, "is_done", lambda self, number: arrived.is_set() and is_done(self, number))
    with ThreadPoolExecutor(2) as threads:
        copy = threads.submit(memories.copy, True, [(0, 0, 1000)])
        until(lambda: loop._in_flight == 1, "the copy is in flight")
        let_go = threads.submit(loop.deregister, memories.numbers[1])
        with pytest.raises(TimeoutError):
            let_go.result(0.2)
        arrived.set()
        copy.result(WAIT_S)
        let_go.result(WAIT_S)
    loop.close()


def test_without_an_agent_there_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "self")
    with pytest.raises(LoopError, match="NIXL makes no agent"):
        Loop()
