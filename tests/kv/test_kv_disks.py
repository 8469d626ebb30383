"""Disks as they are: full, and read-only. Needs root and mount namespaces; skipped elsewhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import (
    BlockKey,
    KVLayout,
    KVPart,
    PosixStore,
    PrefixIndex,
    StoreError,
    StoreWriteError,
    block_keys,
    namespace,
    rebuild,
)
from dualpath.kv.stores.inspection import fsck

pytestmark = pytest.mark.privileged

LAYOUT = KVLayout.alike(2, (KVPart("kv", 1, 64),), "float32", block_tokens=128)  # 64 KiB
SPACE = namespace("disk", "1", LAYOUT)
KEYS = block_keys(SPACE.root, range(64 * 128), 128)


def payload_of(key: BlockKey) -> bytes:
    return np.random.default_rng(key[0]).integers(0, 256, LAYOUT.full_block_bytes, dtype=np.uint8).tobytes()


def read_all(store: PosixStore, keys: list[BlockKey]) -> None:
    into = bytearray(LAYOUT.full_block_bytes)
    for key in keys:
        store.read(SPACE, key, into)
        assert into == payload_of(key)


def write_until_refused(store: PosixStore) -> list[BlockKey]:
    written: list[BlockKey] = []
    try:
        for key, parent in zip(KEYS, [SPACE.root, *KEYS], strict=False):
            store.write(SPACE, key, parent, payload_of(key))
            written.append(key)
    except StoreWriteError as error:
        assert "No space left" in str(error)
    return written


def full(home: Path) -> None:
    """What was acknowledged stays, what was not leaves nothing; it restarts, and stores again when there is room."""
    store = PosixStore(home)
    written = write_until_refused(store)
    assert 4 <= len(written) < len(KEYS)
    assert list(home.rglob("*.tmp")) == []
    read_all(store, written)
    again = PosixStore(home)
    again.prepare(SPACE)
    again.prepare(namespace("disk", "1", LAYOUT, "a new tenant"))
    index = PrefixIndex()
    assert rebuild(index, again, clean=True).published_blocks == len(written)
    assert fsck(again, repair=True).is_clean
    assert again.delete(SPACE.root, written[-1])
    again.write(SPACE, written[-1], written[-2], payload_of(written[-1]))
    (path,) = home.rglob(f"{written[0].hex()}.kv")
    path.write_bytes(b"half")
    assert again.quarantine(SPACE.root, written[0]) is not None, "a full disk has room for a name"
    for key in written[1:]:
        assert again.delete(SPACE.root, key)
    assert len(write_until_refused(again)) == len(written)


def read_only(home: Path) -> None:
    """It starts with a bad block, an orphan, an old draft and no description, and reads what it has."""
    store = PosixStore(home)
    store.prepare(SPACE)
    index = PrefixIndex()
    report = rebuild(index, store, clean=True)
    assert (report.published_blocks, len(report.orphans), report.not_cleaned) == (4, 3, 3)
    assert index.match(KEYS[:8]) == 4
    read_all(store, KEYS[:4])
    found = fsck(store, repair=True)
    assert not found.is_repaired and len(found.not_repaired) == 3
    for refused in (
        lambda: store.write(SPACE, KEYS[9], KEYS[8], payload_of(KEYS[9])),
        lambda: store.delete(SPACE.root, KEYS[3]),
        lambda: store.quarantine(SPACE.root, KEYS[4]),
    ):
        with pytest.raises(StoreError, match="Read-only"):
            refused()
    read_all(store, KEYS[:4])


def in_mounts(mount: str, work: Callable[[Path], None], home: Path) -> None:
    code = (
        f"import pathlib; from tests.kv.test_kv_disks import {work.__name__} as work; work(pathlib.Path({str(home)!r}))"
    )
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces need root")
    command = ["unshare", "-m", "sh", "-ec", f'{mount}; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    in_mounts(f"mount -t tmpfs -o size=1M tmpfs {tmp_path}", full, tmp_path)


def test_a_read_only_disk(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    for key, parent in zip(KEYS[:8], [SPACE.root, *KEYS], strict=False):
        store.write(SPACE, key, parent, payload_of(key))
    (bad,) = tmp_path.rglob(f"{KEYS[4].hex()}.kv")
    bad.write_bytes(b"half")
    bad.with_name(".x.kv.00000000.1.abcd.tmp").touch()
    os.utime(bad.with_name(".x.kv.00000000.1.abcd.tmp"), (0, 0))
    (tmp_path / SPACE.hex / "namespace.json").unlink()
    in_mounts(f"mount --bind {tmp_path} {tmp_path}; mount -o remount,bind,ro {tmp_path}", read_only, tmp_path)
