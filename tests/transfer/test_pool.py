"""BufferPool: ownership against a model, exhaustion, quarantine, and what is left after a creator's death."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualpath.cluster.shared_rows import SharedRows
from dualpath.transfer.pool import BufferPool, PoolExhausted
from dualpath.transfer.pool_files import sweep_dead_pools

OWNERS = [("request", 1), ("request", 2), "storage"]
PAGES = 7


def unique_name() -> str:
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def pool():
    with contextlib.closing(BufferPool.create(unique_name(), 5000, PAGES)) as pool:
        yield pool


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: a dictionary from page to (state, owner); a page that is not in it is free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool.create(unique_name(), 100, PAGES)
        self.model: dict[int, tuple[str, object]] = {}
        self.most = 0

    def teardown(self) -> None:
        self.pool.close()

    @rule(owner=st.sampled_from(OWNERS), n_pages=st.integers(0, PAGES + 1))
    def allocate(self, owner, n_pages):
        if n_pages > PAGES - len(self.model):
            with pytest.raises(PoolExhausted):
                self.pool.allocate(owner, n_pages)
            return
        pages = self.pool.allocate(owner, n_pages)
        assert len(set(pages)) == n_pages
        assert not set(pages) & set(self.model)
        self.model |= dict.fromkeys(pages, ("held", owner))
        self.most = max(self.most, len(self.model))

    @rule(owner=st.sampled_from(OWNERS), pages=st.lists(st.integers(-1, PAGES), max_size=4), quarantine=st.booleans())
    def give_back_anything(self, owner, pages, quarantine):
        action = self.pool.quarantine if quarantine else self.pool.free
        if len(set(pages)) == len(pages) and all(self.model.get(page) == ("held", owner) for page in pages):
            action(owner, pages)
            for page in pages:
                del self.model[page]
                if quarantine:
                    self.model[page] = ("quarantined", owner)
        else:
            with pytest.raises(ValueError, match="does not hold page"):
                action(owner, pages)

    @precondition(lambda self: any(state == "held" for state, _ in self.model.values()))
    @rule(data=st.data(), quarantine=st.booleans())
    def give_back_own(self, data, quarantine):
        held = sorted(page for page, (state, _) in self.model.items() if state == "held")
        page = data.draw(st.sampled_from(held))
        owner = self.model[page][1]
        self.give_back_anything(owner, [page], quarantine)

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner):
        quarantined = [page for page, at in self.model.items() if at == ("quarantined", owner)]
        assert self.pool.release_quarantine(owner) == len(quarantined)
        for page in quarantined:
            del self.model[page]

    @invariant()
    def gauges_agree(self):
        states = [state for state, _ in self.model.values()]
        statistics = self.pool.statistics()
        assert statistics.held_pages == states.count("held")
        assert statistics.quarantined_pages == states.count("quarantined")
        assert statistics.free_pages + statistics.held_pages + statistics.quarantined_pages == PAGES
        assert statistics.high_water_pages == self.most
        held = [owner for state, owner in self.model.values() if state == "held"]
        assert self.pool.holders() == {owner: held.count(owner) for owner in set(held)}


PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase


def test_exhaustion_names_the_figures_and_changes_nothing(pool):
    pool.allocate("a", 5)
    with pytest.raises(PoolExhausted, match=r"'b' needs 3 pages of .*, 2 of 7 are free"):
        pool.allocate("b", 3)
    assert pool.statistics().free_pages == 2
    assert "b" not in pool.holders()


def test_double_free_and_wrong_owner_say_so(pool):
    page, *_ = pool.allocate("a", 2)
    with pytest.raises(ValueError, match="'a' holds it"):
        pool.free("b", [page])
    pool.free("a", [page])
    with pytest.raises(ValueError, match="freed twice"):
        pool.free("a", [page])


def test_quarantined_pages_are_not_handed_on(pool):
    pages = pool.allocate("a", PAGES)
    pool.quarantine("a", pages[:3])
    pool.free("a", pages[3:])
    assert not set(pool.allocate("b", 4)) & set(pages[:3])
    with pytest.raises(PoolExhausted, match="3 quarantined"):
        pool.allocate("b", 1)
    with pytest.raises(ValueError, match="quarantined for 'a'"):
        pool.free("a", pages[:1])
    assert pool.release_quarantine("a") == 3
    assert sorted(pool.allocate("b", 3)) == sorted(pages[:3])


def test_pages_are_aligned_disjoint_and_shared_with_a_peer(pool):
    peer = BufferPool.attach(pool.path)
    assert (peer.page_bytes, peer.stride_bytes, peer.pages) == (5000, 8192, PAGES)
    for page in range(PAGES):
        assert pool.view(page).ctypes.data % 4096 == 0
        pool.view(page)[:] = page + 1
    for page in range(PAGES):
        assert np.all(peer.view(page) == page + 1)
    peer.view(3)[:] = 99
    assert np.all(pool.view(3) == 99)
    assert np.all(pool.view(4) == 5)


def test_views_outlive_close_but_new_ones_are_refused(pool):
    view = pool.view(0)
    view[:] = 7
    pool.close()
    assert not pool.path.exists()
    assert view[0] == 7
    with pytest.raises(ValueError, match="closed"):
        pool.view(0)
    pool.close()


def test_bad_arguments(pool, tmp_path):
    with pytest.raises(IndexError, match="page 7 is outside"):
        pool.view(PAGES)
    with pytest.raises(IndexError):
        pool.view(-1)
    with pytest.raises(ValueError, match="pool name"):
        BufferPool.create("../evil", 100, 1)
    with pytest.raises(ValueError, match="at least 1"):
        BufferPool.create(unique_name(), 0, 1)
    other = tmp_path / "other"
    other.write_bytes(b"x" * 8192)
    with pytest.raises(ValueError, match="not a buffer pool"):
        BufferPool.attach(other)
    with pytest.raises(FileNotFoundError):
        BufferPool.attach(tmp_path / "gone")


def test_memory_that_is_not_there_is_refused_at_creation():
    room = os.statvfs("/dev/shm")
    name = unique_name()
    with pytest.raises(OSError, match="make the buffer smaller"):
        BufferPool.create(name, 1 << 20, 2 * room.f_blocks * room.f_frsize // (1 << 20))
    assert not list(Path("/dev/shm").glob(f"dualpath-{os.getpid()}-{name}*"))


def test_sweep_removes_the_pool_of_a_killed_creator_only(tmp_path):
    pool = BufferPool.create("living", 4096, 1, directory=tmp_path)
    script = (
        "import sys\nfrom pathlib import Path\nfrom dualpath.transfer.pool import BufferPool\n"
        f"pool = BufferPool.create('orphan', 4096, 4, directory=Path({str(tmp_path)!r}))\n"
        "print(pool.path, flush=True)\nsys.stdin.read()"
    )
    creator = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        orphan = Path(creator.stdout.readline().strip())
        assert orphan.exists()
        assert sweep_dead_pools(tmp_path) == []
        attached = BufferPool.attach(orphan)
        creator.send_signal(signal.SIGKILL)
        creator.wait(timeout=30)
        assert sweep_dead_pools(tmp_path) == [orphan]
        assert pool.path.exists()
        assert not orphan.exists()
        attached.view(0)[:] = 1
    finally:
        creator.kill()
        creator.communicate()
        pool.close()


@pytest.mark.parametrize(
    "create",
    [
        lambda where: BufferPool.create("same", 4096, 1, directory=where),
        lambda where: SharedRows.create("rows", 4096, directory=where),
    ],
)
def test_nobody_can_take_a_name_first(tmp_path, create):
    """All users share /dev/shm, and two containers that share it may have the same pids."""
    with contextlib.closing(create(tmp_path)) as one, contextlib.closing(create(tmp_path)) as other:
        assert one.path != other.path
        assert {one.path.parent, other.path.parent} == {tmp_path}
