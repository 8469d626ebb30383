"""Writers of one store, killed by ``kill -9`` again and again: what was acknowledged stays, nothing torn is served.

    PYTHONPATH=src python -m tests.kv.crash_writers --kills 1000 --writers 4

Every writer writes and deletes blocks of its own in namespaces that all share, so namespaces also come and go. It
tells what it has done through a pipe. What it has told as written, and not as about to be deleted, must be there.
"""

import argparse
import os
import random
import select
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from dualpath.kv import BadFile, BlockError, BlockKey, KVLayout, KVPart, Namespace, PosixStore, block_keys, namespace
from dualpath.kv.stores.inspection import fsck

LAYOUT = KVLayout.alike(2, (KVPart("k", 2, 64), KVPart("v", 2, 64)), "float32", block_tokens=576)  # 1.1 MiB: two chunks
SPACES = [namespace("crash", "1", LAYOUT, f"tenant {n}") for n in range(3)]
KEYS_EACH = 6
WRITTEN, DELETING, DELETED, MOVED = range(4)
MOST_EVENTS = 12
"""A writer lives for up to so many events; a chunk of a block that moves is one."""


class Place(NamedTuple):
    """A block that a writer may write: the number of its namespace, and its own."""

    space: int
    number: int

    @property
    def namespace(self) -> Namespace:
        return SPACES[self.space]

    @property
    def key(self) -> BlockKey:
        return block_keys(self.namespace.root, range(self.number, self.number + 576), 576)[0]


class Figures(msgspec.Struct):
    """What a run has counted."""

    kills: int = 0
    acknowledged_blocks: int = 0
    deleted_blocks: int = 0
    checked_blocks: int = 0
    lost_blocks: int = 0
    torn_blocks: int = 0
    drafts_left_by_kills: int = 0
    drafts_after_cleaning: int = 0
    undescribed_namespaces: int = 0
    seconds: float = 0.0


def payload_of(key: BlockKey) -> bytes:
    return np.random.default_rng(key[0]).integers(0, 256, LAYOUT.full_block_bytes, dtype=np.uint8).tobytes()


class Writer:
    """A process that writes until it is killed, and what it has told."""

    def __init__(self, directory: Path, slot: int, seed: int) -> None:
        self.places = [Place(s, slot * KEYS_EACH + n) for s in range(len(SPACES)) for n in range(KEYS_EACH)]
        self.acknowledged: set[Place] = set()
        self._directory = directory
        self.start(seed)

    def start(self, seed: int) -> None:
        self.pipe, send = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._work(send, random.Random(seed))
            finally:
                os._exit(3)
        os.close(send)

    def _work(self, send: int, moments: random.Random) -> None:
        store = PosixStore(self._directory)
        while True:
            place = moments.choice(self.places)

            def tell(event: int, place: Place = place) -> None:
                os.write(send, bytes((event, place.space, place.number)))

            if moments.random() < 0.45:
                tell(DELETING)
                store.delete(place.namespace.root, place.key)
                tell(DELETED)
            else:
                payload = payload_of(place.key)
                store.write(place.namespace, place.key, place.namespace.root, payload, lambda _: tell(MOVED))
                tell(WRITTEN)

    def listen(self, figures: Figures, events: int) -> None:
        """Take in what it tells, `events` messages or all there are once it is dead."""
        while events:
            assert select.select([self.pipe], [], [], 60)[0], "a writer is stuck"
            message = os.read(self.pipe, 3)
            if not message:
                return
            event, place = message[0], Place(*message[1:])
            events -= 1
            if event == WRITTEN:
                figures.acknowledged_blocks += 1
                self.acknowledged.add(place)
            elif event == DELETING:
                self.acknowledged.discard(place)
            elif event == DELETED:
                figures.deleted_blocks += 1

    def kill(self, figures: Figures) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL, "a writer has failed"
        self.listen(figures, -1)
        os.close(self.pipe)
        figures.kills += 1


def check(store: PosixStore, places: Iterable[Place], figures: Figures) -> None:
    into = bytearray(LAYOUT.full_block_bytes)
    for place in places:
        figures.checked_blocks += 1
        try:
            store.read(place.namespace, place.key, into)
        except BlockError as error:
            figures.lost_blocks += 1
            print("lost:", error)
        else:
            figures.torn_blocks += into != payload_of(place.key)


def run(directory: Path, *, kills: int, writers: int, seed: int) -> Figures:
    moments, figures, began_s = random.Random(seed), Figures(), time.monotonic()
    store = PosixStore(directory)
    running = [Writer(directory, slot, moments.getrandbits(32)) for slot in range(writers)]
    while figures.kills < kills:
        victim = moments.choice(running)
        victim.listen(figures, moments.randint(1, MOST_EVENTS))
        time.sleep(moments.random() * 0.003)  # in the middle of something
        victim.kill(figures)
        check(store, victim.acknowledged, figures)
        victim.start(moments.getrandbits(32))
    for writer in running:
        writer.kill(figures)
    _check_all(store, directory, running, figures)
    figures.seconds = time.monotonic() - began_s
    return figures


def _check_all(store: PosixStore, directory: Path, writers: list[Writer], figures: Figures) -> None:
    for writer in writers:
        check(store, writer.acknowledged, figures)
    bad: list[BadFile] = []
    spaces = {space.root: space for space in SPACES}
    into = bytearray(LAYOUT.full_block_bytes)
    for record in store.scan(bad.append):
        store.read(spaces[record.root], record.key, into)
        figures.torn_blocks += into != payload_of(record.key)
    figures.torn_blocks += len(bad)
    figures.drafts_left_by_kills = len(list(directory.rglob("*.tmp")))
    figures.undescribed_namespaces = len(fsck(store).undescribed)
    for space in SPACES:
        store.prepare(space)
    figures.drafts_after_cleaning = len(list(directory.rglob("*.tmp")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        figures = run(Path(directory), kills=arguments.kills, writers=arguments.writers, seed=arguments.seed)
    for name, value in msgspec.to_builtins(figures).items():
        print(f"{name.replace('_', ' '):>24} {value:,}")


if __name__ == "__main__":
    main()
