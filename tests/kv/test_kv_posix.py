import errno
import os
import resource
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dualpath.kv import (
    BlockError,
    BlockFault,
    BlockKey,
    BlockUnavailableError,
    KVLayout,
    Namespace,
    PosixStore,
    StoreError,
    StoreWriteError,
    block_keys,
)
from dualpath.kv.stores.block_file import PAGE_BYTES

PayloadOf = Callable[[BlockKey], np.ndarray]
PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]


def fault_of(store: PosixStore, space: Namespace, key: BlockKey) -> BlockFault:
    with pytest.raises(BlockError) as caught:
        store.read(space, key, bytearray(space.layout.full_block_bytes))
    assert caught.value.key == key
    assert key.hex() in str(caught.value)
    return caught.value.cause


def drafts(directory: Path) -> list[Path]:
    return list(directory.rglob("*.tmp"))


def test_write_reports_what_the_disk_holds(
    store: PosixStore, payload_of: PayloadOf, path_of: PathOf, space: Namespace
) -> None:
    key = block_keys(space.root, range(16), 16)[0]
    n_bytes = store.write(space, key, space.root, payload_of(key))
    status = path_of(key).stat()
    assert n_bytes == max(status.st_blocks * 512, status.st_size) >= PAGE_BYTES + 3 * 256
    assert [record.physical_bytes for record in store.scan()] == [n_bytes]


def test_every_flipped_byte_is_noticed(
    store: PosixStore, write_chain: WriteChain, path_of: PathOf, space: Namespace
) -> None:
    (key,) = write_chain(1)
    raw = path_of(key).read_bytes()
    for position in range(len(raw)):
        with path_of(key).open("r+b") as file:
            file.seek(position)
            file.write(bytes([raw[position] ^ 1 << position % 8]))
            file.flush()
            expected = BlockFault.HEADER if position < PAGE_BYTES else BlockFault.CHECKSUM
            assert fault_of(store, space, key) is expected, f"byte {position}"
            file.seek(position)
            file.write(raw[position : position + 1])
    store.read(space, key, bytearray(768))


def test_a_store_that_cannot_be_opened_says_where(tmp_path: Path, space: Namespace) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"the store at {tmp_path}/file cannot be opened: .*Not a directory"):
        PosixStore(tmp_path / "file").prepare(space)


def test_a_store_out_of_reach_is_no_fault_of_its_blocks(
    store: PosixStore, space: Namespace, tmp_path: Path, write_chain: WriteChain
) -> None:
    """A file system that is not mounted here must not empty the index of those who see it."""
    (key,) = write_chain(1)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="store cannot be opened: there is no such directory"):
        store.read(space, key, bytearray(768))
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    store.read(space, key, bytearray(768))


def test_a_block_found_in_place_is_only_reported_once_its_name_is_durable(
    store: PosixStore, write_chain: WriteChain, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch, space: Namespace
) -> None:
    """Whoever renamed it may not have flushed the directory yet."""
    (key,) = write_chain(1)
    flushed: list[bool] = []
    genuine = os.fsync

    def watched(fd: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        genuine(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched)
        store.write(space, key, space.root, payload_of(key))
    assert flushed == [True]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(StoreWriteError, match="Input/output error"):
            store.write(space, key, space.root, payload_of(key))


def failing_fsync(_fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("call", ["open", "write", "fsync", "preadv", "posix_fadvise"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_leaves_nothing(
    store: PosixStore,
    tmp_path: Path,
    payload_of: PayloadOf,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    space: Namespace,
) -> None:
    key = block_keys(space.root, range(16), 16)[0]
    genuine = getattr(os, call)

    def failing(*arguments: object) -> object:
        if call == "open" and not arguments[1] & os.O_CREAT:  # type: ignore[operator]
            return genuine(*arguments)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreWriteError, match=f"{key.hex()} was not written") as caught:
            store.write(space, key, space.root, payload_of(key))
    cause: BaseException | None = caught.value.__cause__
    while isinstance(cause, BlockUnavailableError):
        cause = cause.__cause__
    assert isinstance(cause, OSError) and cause.errno == code
    assert drafts(tmp_path) == [] and list(tmp_path.rglob("*.kv")) == []
    store.write(space, key, space.root, payload_of(key))


def test_a_disk_that_fills_half_way_through_a_block(
    store: PosixStore, tmp_path: Path, payload_of: PayloadOf, space: Namespace
) -> None:
    """A real short write, then a real error: the child may only write files of 4,500 bytes."""
    key = block_keys(space.root, range(16), 16)[0]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))
            store.write(space, key, space.root, payload_of(key))
        except StoreWriteError as error:
            code = 0 if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert drafts(tmp_path) == [] and fault_of(store, space, key) is BlockFault.MISSING


@pytest.mark.parametrize(("n_bytes", "cause"), [(PAGE_BYTES, BlockFault.HEADER), (768, BlockFault.CHECKSUM)])
def test_a_disk_that_stores_something_else_is_found_out(
    store: PosixStore,
    tmp_path: Path,
    payload_of: PayloadOf,
    monkeypatch: pytest.MonkeyPatch,
    n_bytes: int,
    cause: BlockFault,
    space: Namespace,
) -> None:
    key = block_keys(space.root, range(16), 16)[0]
    genuine = os.write

    def lying(fd: int, data: memoryview) -> int:
        changed = bytearray(data)
        changed[-1] ^= len(data) == n_bytes
        return genuine(fd, changed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lying)
        with pytest.raises(StoreWriteError) as caught:
            store.write(space, key, space.root, payload_of(key))
    assert isinstance(caught.value.__cause__, BlockError) and caught.value.__cause__.cause is cause
    assert list(tmp_path.rglob("*.kv")) == [] and drafts(tmp_path) == []


def test_opening_removes_only_leftovers(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf, space: Namespace
) -> None:
    (key,) = write_chain(1)
    child = os.fork()
    if child == 0:
        try:
            store.write(space, block_keys(key, range(16), 16)[0], key, bytes(768), pace=lambda _: os._exit(0))
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    (dead,) = drafts(tmp_path)
    fields = dead.name.split(".")
    alive = dead.with_name(".".join([*fields[:-3], str(os.getpid()), *fields[-2:]]))
    elsewhere = dead.with_name(".".join([*fields[:-4], "0" * 8, *fields[-3:]]))
    old = dead.with_name("." + elsewhere.name)
    for path in (alive, elsewhere, old):
        path.write_bytes(b"half a block")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    PosixStore(tmp_path / "store").prepare(space)
    assert sorted(drafts(tmp_path)) == sorted([alive, elsewhere])
    store.read(space, key, bytearray(768))


def test_the_description_is_repaired_at_open(
    store: PosixStore, tmp_path: Path, space: Namespace, write_chain: WriteChain
) -> None:
    write_chain(1)
    path = tmp_path / "store" / space.hex / "namespace.json"
    described = msgspec.json.decode(path.read_bytes())
    assert described["namespace"] == space.hex
    assert described["model_fingerprint"] == "tiny-model" and described["layout"]["layer_kinds"] == [0, 0, 0]
    path.write_bytes(b"{")
    PosixStore(tmp_path / "store").prepare(space)
    assert msgspec.json.decode(path.read_bytes()) == described


def test_checks_can_be_turned_off_to_measure_them(
    tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PosixStore(tmp_path, durable=False, verify_writes=False, verify_reads=False)
    key = block_keys(space.root, range(16), 16)[0]
    with monkeypatch.context() as patch:
        for call in ("fsync", "preadv"):
            patch.setattr(os, call, lambda *_: pytest.fail("was turned off"))
        store.write(space, key, space.root, payload_of(key))
    (path,) = tmp_path.rglob("*.kv")
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"wrong")
    into = bytearray(768)
    store.read(space, key, into)
    assert into.startswith(b"wrong")
