"""kill -9 in the middle of writes: after reopening, only whole and valid blocks are there, and no temporary file."""

import os
import random
import select
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import BlockKey, KVLayout, KVPart, Namespace, PosixStore, block_keys, namespace

pytestmark = pytest.mark.slow

LAYOUT = KVLayout(4, (KVPart("k", 2, 64), KVPart("v", 2, 64)), "float32", block_tokens=1024)  # 4 MiB: four chunks
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


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """From outside, while the child writes block after block; a block it has announced is there for good."""
    moments, announced_in_all = random.Random(7), 0
    for _ in range(25):
        directory = tmp_path / "store"
        receive, send = os.pipe()

        def work(directory: Path = directory, send: int = send) -> None:
            store = PosixStore(directory)
            for n, (key, parent) in enumerate(zip(KEYS, [SPACE.root, *KEYS], strict=False)):
                store.delete(SPACE.root, key)
                store.write(SPACE, key, parent, payload_of(key), pace=lambda _: os.write(send, b"c") and None)
                os.write(send, b"%d" % n)
            signal.pause()

        child = in_child(work)
        os.close(send)
        events, wanted = b"", moments.randint(1, 5 * len(KEYS) - 1)
        while len(events) < wanted:
            assert select.select([receive], [], [], 60)[0], "the child is stuck"
            events += os.read(receive, 1)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(receive)
        announced = {KEYS[int(event)] for event in events.decode() if event != "c"}
        announced_in_all += len(announced)
        # The block after the last announced one may have been deleted again by the child, never an announced one.
        assert announced <= reopened(directory)
    assert announced_in_all > 0
