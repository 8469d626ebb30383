"""kill -9 in the middle of writes: after reopening, only whole and valid blocks are there, and no temporary file."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import BlockKey, KVLayout, KVPart, Namespace, PosixStore, block_keys, namespace

from .crash_writers import run

pytestmark = pytest.mark.slow

LAYOUT = KVLayout.alike(4, (KVPart("k", 2, 64), KVPart("v", 2, 64)), "float32", block_tokens=1024)  # 4 MiB: four chunks
SPACE = namespace("crash", "1", LAYOUT)
SITES = ("write", "fsync", "posix_fadvise", "pread", "preadv", "close", "rename")
KEYS = block_keys(SPACE.root, range(4 * 1024), 1024)


def payload_of(key: BlockKey) -> np.ndarray:
    return np.random.default_rng(key[0]).integers(0, 256, LAYOUT.full_block_bytes, dtype=np.uint8)


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)
    return child


def reopened(directory: Path, space: Namespace = SPACE) -> set[BlockKey]:
    """Blocks that a new process sees; each of them must be right."""
    store = PosixStore(directory)
    store.prepare(space)
    seen = {record.key for record in store.scan(on_bad=lambda file: pytest.fail(str(file)))}
    into = np.zeros(LAYOUT.full_block_bytes, dtype=np.uint8)
    for key in seen:
        store.read(space, key, into)
        assert (into == payload_of(key)).all()
    assert list(directory.rglob("*.tmp")) == []
    return seen


def die_at_step(step: int, steps: list[str]) -> None:
    """Make the `step`-th system call of this process kill it; a write gets half of its bytes out first."""
    genuine = {site: getattr(os, site) for site in SITES if site != "rename"}
    replace = Path.replace

    def counted(site: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object) -> object:
            steps.append(site)
            if len(steps) == step:
                if site == "write":
                    fd, data = arguments
                    genuine["write"](fd, memoryview(data)[: len(data) // 2])  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return wrapped

    for site, call in genuine.items():
        setattr(os, site, counted(site, call))
    Path.replace = counted("rename", replace)  # type: ignore[method-assign, assignment]


def test_killed_at_every_step_of_a_write(tmp_path: Path) -> None:
    """The child dies before its first, second, … system call until it gets through; the rename is the turning point."""
    key, outcomes = KEYS[0], []
    for step in range(1, 100):
        directory = tmp_path / str(step)
        PosixStore(directory).prepare(SPACE)
        payload = payload_of(key)

        def work(step: int = step, directory: Path = directory, payload: np.ndarray = payload) -> None:
            store = PosixStore(directory)
            die_at_step(step, [])
            store.write(SPACE, key, SPACE.root, payload)
            os._exit(0)

        status = os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])
        outcomes.append((status, bool(reopened(directory))))
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert outcomes[-1] == (0, True), "the last child was not killed"
    visible = [seen for _, seen in outcomes]
    assert visible == sorted(visible), "once visible, always visible"
    assert visible.count(False) >= 12, "header, four chunks, fsync, fadvise, header, four chunks read back, rename"
    assert visible.count(True) >= 2, "killed after the rename"


@pytest.mark.parametrize(("kills", "writers"), [(25, 1), (40, 3)])
def test_killed_at_random_moments(tmp_path: Path, kills: int, writers: int) -> None:
    """From outside, while several write and delete in the same namespaces. `crash_writers` does it a thousand times."""
    figures = run(tmp_path, kills=kills, writers=writers, seed=7)
    assert figures.acknowledged_blocks > kills / 2 and figures.checked_blocks > kills / 2
    assert (figures.lost_blocks, figures.torn_blocks, figures.drafts_after_cleaning) == (0, 0, 0)
    assert figures.drafts_left_by_kills > 0, "some died in the middle of a block"
