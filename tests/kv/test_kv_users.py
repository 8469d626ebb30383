"""Who may read a store, tried as other users. Needs root; skipped elsewhere."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import BlockFault, BlockKey, Namespace, PosixStore, StoreError, block_keys
from dualpath.kv.stores.inspection import fsck

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may become other users"),
]

PayloadOf = Callable[[BlockKey], np.ndarray]
ANNA, BERND, GROUP = 12001, 12002, 12000
STRANGER = 12003


@pytest.fixture
def home() -> Iterator[Path]:
    """A store's directory that its users can reach; pytest's own is root's."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o711)
        home = Path(directory) / "kv"
        home.mkdir()
        os.chown(home, ANNA, GROUP)
        yield home


def as_user(user: int, group: int, work: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            os.umask(0o022)
            work()
            code = 0
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def write(home: Path, space: Namespace, payload_of: PayloadOf, first: int, blocks: int) -> list[BlockKey]:
    store = PosixStore(home)
    keys = block_keys(space.root, range(first, first + 16 * blocks), 16)
    for key, parent in zip(keys, [space.root, *keys], strict=False):
        store.write(space, key, parent, payload_of(key))
    return keys


def test_a_store_is_its_owners_alone(home: Path, space: Namespace, payload_of: PayloadOf) -> None:
    """Also in a directory that everybody may look into and write to, and whatever its group."""
    home.chmod(0o777)
    as_user(ANNA, GROUP, lambda: write(home, space, payload_of, 0, 2) and None)
    keys = block_keys(space.root, range(32), 16)

    def look() -> None:
        store = PosixStore(home)
        with pytest.raises(StoreError):
            store.read(space, keys[0], bytearray(768))
        with pytest.raises(StoreError):
            store.delete(space.root, keys[0])
        for path in home.rglob("*"):
            with pytest.raises(PermissionError):
                path.read_bytes()
        assert len(fsck(store).unavailable) == 1

    for user, group in ((BERND, GROUP), (STRANGER, STRANGER)):
        as_user(user, group, look)


def test_a_store_that_a_group_shares(home: Path, space: Namespace, payload_of: PayloadOf) -> None:
    """Each of its users reads, repairs and deletes what others wrote; strangers see nothing."""
    home.chmod(0o2770)
    as_user(ANNA, GROUP, lambda: write(home, space, payload_of, 0, 3) and None)
    keys = block_keys(space.root, range(48), 16)

    def take_part() -> None:
        store = PosixStore(home)
        into = bytearray(768)
        store.read(space, keys[0], into)
        assert into == payload_of(keys[0]).tobytes()
        (path,) = home.rglob(f"{keys[2].hex()}.kv")
        path.write_bytes(b"half")
        assert store.quarantine(space.root, keys[2]) is BlockFault.TRUNCATED
        assert store.delete(space.root, keys[1])
        assert write(home, space, payload_of, 0, 3) == keys
        assert fsck(store, repair=True).is_clean

    def look() -> None:
        with pytest.raises(StoreError):
            PosixStore(home).prepare(space)
        with pytest.raises(StoreError):
            PosixStore(home).read(space, keys[0], bytearray(768))

    as_user(BERND, GROUP, take_part)
    as_user(ANNA, GROUP, take_part)
    as_user(STRANGER, STRANGER, look)

    def leave() -> None:
        store = PosixStore(home)
        for record in list(store.scan()):
            assert store.delete(record.root, record.key)
        assert list(home.iterdir()) == []

    as_user(BERND, GROUP, leave)
