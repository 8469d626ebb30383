import errno
import os
import resource
import stat
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dualpath.kv import (
    BlockError,
    BlockFault,
    BlockKey,
    KVLayout,
    KVPart,
    Namespace,
    PosixStore,
    StoreError,
    StoreWriteError,
    block_keys,
    namespace,
)
from dualpath.kv.block_file import CHUNK_BYTES, PAGE_BYTES
from dualpath.kv.directory import MAX_QUARANTINED_FILES, BadFile

PayloadOf = Callable[[BlockKey], np.ndarray]
PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]


def fault_of(store: PosixStore, key: BlockKey) -> BlockFault:
    with pytest.raises(BlockError) as caught:
        store.read(key, bytearray(store.namespace.layout.full_block_bytes))
    assert caught.value.key == key
    assert key.hex() in str(caught.value)
    return caught.value.cause


def drafts(directory: Path) -> list[Path]:
    return list(directory.rglob("*.tmp"))


def test_round_trip(store: PosixStore, write_chain: WriteChain, payload_of: PayloadOf, path_of: PathOf) -> None:
    for key in write_chain(3):
        into = bytearray(store.namespace.layout.full_block_bytes)
        store.read(key, into)
        assert into == payload_of(key).tobytes()
        raw = path_of(key).read_bytes()
        assert raw[PAGE_BYTES:] == bytes(into), "the payload starts on a page and nothing follows it"


def test_write_reports_what_the_disk_holds(store: PosixStore, payload_of: PayloadOf, path_of: PathOf) -> None:
    key = block_keys(store.namespace.root, range(16), 16)[0]
    n_bytes = store.write(key, store.namespace.root, payload_of(key))
    status = path_of(key).stat()
    assert n_bytes == max(status.st_blocks * 512, status.st_size) >= PAGE_BYTES + 3 * 256
    assert [record.physical_bytes for record in store.scan()] == [n_bytes]


def test_any_contiguous_memory_of_the_right_size_will_do(store: PosixStore, payload_of: PayloadOf) -> None:
    key = block_keys(store.namespace.root, range(16), 16)[0]
    payload = payload_of(key)
    store.write(key, store.namespace.root, payload.view(np.float16).reshape(3, 16, 8))
    into = np.zeros((3, 128), dtype=np.uint16)
    store.read(key, into)
    assert into.tobytes() == payload.tobytes()
    wide = np.zeros((768, 2), dtype=np.uint8)
    for wrong in (bytearray(767), bytearray(769), wide[:, 0]):
        with pytest.raises(ValueError, match="768 contiguous bytes"):
            store.read(key, wrong)
        with pytest.raises(ValueError, match="768 contiguous bytes"):
            store.write(key, store.namespace.root, wrong)
    with pytest.raises(ValueError, match="writable memory"):
        store.read(key, bytes(768))
    with pytest.raises(ValueError, match="keys have 16 bytes"):
        store.write(b"short", store.namespace.root, payload)


@pytest.mark.parametrize("layers", [501, 502, 1100])
def test_many_layers_grow_the_header_by_pages(tmp_path: Path, layers: int) -> None:
    layout = KVLayout(layers, (KVPart("k", 1, 1),), "float16", block_tokens=1)
    store = PosixStore(tmp_path, layout, namespace("deep", "1", layout))
    key = block_keys(store.namespace.root, [1], 1)[0]
    payload = bytes(n % 251 for n in range(layout.full_block_bytes))
    store.write(key, store.namespace.root, payload)
    (path,) = tmp_path.rglob("*.kv")
    header_bytes = {501: 4096, 502: 8192, 1100: 12288}[layers]
    assert path.read_bytes()[header_bytes:] == payload
    into = bytearray(layout.full_block_bytes)
    store.read(key, into)
    assert into == payload
    for length, cause in ((header_bytes - 1, BlockFault.TRUNCATED), (0, BlockFault.TRUNCATED)):
        os.truncate(path, length)
        assert fault_of(store, key) is cause


def test_every_flipped_byte_is_noticed(store: PosixStore, write_chain: WriteChain, path_of: PathOf) -> None:
    (key,) = write_chain(1)
    raw = path_of(key).read_bytes()
    for position in range(len(raw)):
        with path_of(key).open("r+b") as file:
            file.seek(position)
            file.write(bytes([raw[position] ^ 1 << position % 8]))
            file.flush()
            expected = BlockFault.HEADER if position < PAGE_BYTES else BlockFault.CHECKSUM
            assert fault_of(store, key) is expected, f"byte {position}"
            file.seek(position)
            file.write(raw[position : position + 1])
    store.read(key, bytearray(768))


def test_the_message_names_the_layer(store: PosixStore, write_chain: WriteChain, path_of: PathOf) -> None:
    (key,) = write_chain(1)
    with path_of(key).open("r+b") as file:
        file.seek(PAGE_BYTES + 2 * 256)
        file.write(b"wrong")
    with pytest.raises(BlockError, match="checksum: layer 2 does not match"):
        store.read(key, bytearray(768))


def test_truncated_missing_and_overlong_files(store: PosixStore, write_chain: WriteChain, path_of: PathOf) -> None:
    (key,) = write_chain(1)
    path = path_of(key)
    with path.open("ab") as file:
        file.write(b"!")
    assert fault_of(store, key) is BlockFault.HEADER
    for length in (PAGE_BYTES + 767, PAGE_BYTES, PAGE_BYTES - 1, 1, 0):
        os.truncate(path, length)
        assert fault_of(store, key) is BlockFault.TRUNCATED, f"{length} bytes"
    path.unlink()
    assert fault_of(store, key) is BlockFault.MISSING
    path.mkdir()
    assert fault_of(store, key) is BlockFault.IO


def test_a_file_of_another_key_namespace_or_version(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf, payload_of: PayloadOf
) -> None:
    mine, other = write_chain(2)
    path_of(other).replace(path_of(mine))
    assert fault_of(store, mine) is BlockFault.HEADER

    stranger = PosixStore(tmp_path / "store", store.namespace.layout, namespace("other", "1", store.namespace.layout))
    stranger.write(mine, stranger.namespace.root, payload_of(mine))
    foreign = tmp_path / "store" / stranger.namespace.hex / mine.hex()[:2] / f"{mine.hex()}.kv"
    foreign.replace(path_of(mine))
    with pytest.raises(BlockError, match=f"header: the file is of namespace {stranger.namespace.hex}"):
        store.read(mine, bytearray(768))

    raw = bytearray(path_of(mine).read_bytes())
    raw[8:12] = struct.pack("<I", 2)
    path_of(mine).write_bytes(raw)
    with pytest.raises(BlockError, match="format version 2, this program reads version 1"):
        store.read(mine, bytearray(768))


def test_a_block_of_another_geometry(tmp_path: Path, store: PosixStore, payload_of: PayloadOf) -> None:
    """Only a forged namespace can do this; the geometry is checked all the same before bytes go into a buffer."""
    layout = KVLayout(6, (KVPart("k", 1, 4),), "float16", block_tokens=16)
    forged = msgspec.structs.replace(store.namespace, layout=layout)
    key = block_keys(store.namespace.root, range(16), 16)[0]
    PosixStore(tmp_path / "store", layout, forged).write(key, forged.root, payload_of(key))
    with pytest.raises(BlockError, match="6 layers of 128 bytes instead of 3 of 256"):
        store.read(key, bytearray(768))


def test_a_namespace_of_another_layout_is_refused(tmp_path: Path, space: Namespace) -> None:
    with pytest.raises(ValueError, match="was made for KVLayout"):
        PosixStore(tmp_path, msgspec.structs.replace(space.layout, layers=4), space)


def test_a_store_that_cannot_be_opened_says_where(tmp_path: Path, space: Namespace) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"the store at {tmp_path}/file cannot be opened: .*Not a directory"):
        PosixStore(tmp_path / "file", space.layout, space)


def test_a_valid_block_is_left_alone_and_a_damaged_one_replaced(
    store: PosixStore, write_chain: WriteChain, path_of: PathOf, payload_of: PayloadOf
) -> None:
    (key,) = write_chain(1)
    before = path_of(key).stat()
    again = store.write(key, store.namespace.root, payload_of(key), pace=lambda _: pytest.fail("nothing to write"))
    assert path_of(key).stat() == before and again == before.st_blocks * 512
    with path_of(key).open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"wrong")
    assert fault_of(store, key) is BlockFault.CHECKSUM
    store.write(key, store.namespace.root, payload_of(key))
    store.read(key, bytearray(768))


def test_a_block_found_in_place_is_only_reported_once_its_name_is_durable(
    store: PosixStore, write_chain: WriteChain, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
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
        store.write(key, store.namespace.root, payload_of(key))
    assert flushed == [True]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_fsync)
        with pytest.raises(StoreWriteError, match="Input/output error"):
            store.write(key, store.namespace.root, payload_of(key))


def failing_fsync(_fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_pace_sees_every_payload_byte_in_small_chunks(tmp_path: Path) -> None:
    layout = KVLayout(3, (KVPart("k", 1, 1500),), "float32", block_tokens=256)
    store = PosixStore(tmp_path, layout, namespace("wide", "1", layout))
    key = block_keys(store.namespace.root, range(256), 256)[0]
    payload = np.random.default_rng(1).integers(0, 256, layout.full_block_bytes, dtype=np.uint8)
    into = np.zeros_like(payload)
    written: list[int] = []
    read: list[int] = []
    store.write(key, store.namespace.root, payload, pace=written.append)
    store.read(key, into, pace=read.append)
    assert (into == payload).all()
    assert sum(written) == sum(read) == layout.full_block_bytes
    assert max(written) == max(read) == CHUNK_BYTES and len(read) == 5


def test_what_pace_raises_is_passed_on_and_leaves_nothing(
    store: PosixStore, tmp_path: Path, payload_of: PayloadOf
) -> None:
    """TimeoutError is an OSError: a caller's deadline must not look like a fault of the disk."""

    def late(_n_bytes: int) -> None:
        raise TimeoutError("deadline")

    key = block_keys(store.namespace.root, range(16), 16)[0]
    with pytest.raises(TimeoutError, match="deadline"):
        store.write(key, store.namespace.root, payload_of(key), pace=late)
    assert drafts(tmp_path) == [] and fault_of(store, key) is BlockFault.MISSING
    store.write(key, store.namespace.root, payload_of(key))
    with pytest.raises(TimeoutError, match="deadline"):
        store.read(key, bytearray(768), pace=late)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "preadv", "posix_fadvise"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_leaves_nothing(
    store: PosixStore, tmp_path: Path, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    key = block_keys(store.namespace.root, range(16), 16)[0]
    genuine = getattr(os, call)

    def failing(*arguments: object) -> object:
        if call == "open" and not arguments[1] & os.O_CREAT:  # type: ignore[operator]
            return genuine(*arguments)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(StoreWriteError, match=f"{key.hex()} was not written") as caught:
            store.write(key, store.namespace.root, payload_of(key))
    cause: BaseException | None = caught.value.__cause__
    while isinstance(cause, BlockError):
        cause = cause.__cause__
    assert isinstance(cause, OSError) and cause.errno == code
    assert drafts(tmp_path) == [] and list(tmp_path.rglob("*.kv")) == []
    store.write(key, store.namespace.root, payload_of(key))


def test_a_disk_that_fills_half_way_through_a_block(store: PosixStore, tmp_path: Path, payload_of: PayloadOf) -> None:
    """A real short write, then a real error: the child may only write files of 4,500 bytes."""
    key = block_keys(store.namespace.root, range(16), 16)[0]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))
            store.write(key, store.namespace.root, payload_of(key))
        except StoreWriteError as error:
            code = 0 if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFBIG else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert drafts(tmp_path) == [] and fault_of(store, key) is BlockFault.MISSING


@pytest.mark.parametrize(("n_bytes", "cause"), [(PAGE_BYTES, BlockFault.HEADER), (768, BlockFault.CHECKSUM)])
def test_a_disk_that_stores_something_else_is_found_out(
    store: PosixStore,
    tmp_path: Path,
    payload_of: PayloadOf,
    monkeypatch: pytest.MonkeyPatch,
    n_bytes: int,
    cause: BlockFault,
) -> None:
    key = block_keys(store.namespace.root, range(16), 16)[0]
    genuine = os.write

    def lying(fd: int, data: memoryview) -> int:
        changed = bytearray(data)
        changed[-1] ^= len(data) == n_bytes
        return genuine(fd, changed)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lying)
        with pytest.raises(StoreWriteError) as caught:
            store.write(key, store.namespace.root, payload_of(key))
    assert isinstance(caught.value.__cause__, BlockError) and caught.value.__cause__.cause is cause
    assert list(tmp_path.rglob("*.kv")) == [] and drafts(tmp_path) == []


def test_concurrent_writers_of_one_key(
    tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf
) -> None:
    keys = block_keys(space.root, range(64), 16)
    barrier = threading.Barrier(8)

    def write(_writer: int) -> list[int]:
        store = PosixStore(tmp_path / "store", layout, space)
        barrier.wait(timeout=60)
        above = [space.root, *keys]
        return [store.write(key, parent, payload_of(key)) for parent, key in zip(above, keys, strict=False)]

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(write, range(8)))
    assert all(size == sizes[0] for size in sizes)
    store = PosixStore(tmp_path / "store", layout, space)
    assert sorted(record.key for record in store.scan()) == sorted(keys)
    assert drafts(tmp_path) == []
    for key in keys:
        into = bytearray(768)
        store.read(key, into)
        assert into == payload_of(key).tobytes()


def test_one_store_read_by_many_threads_at_once(
    store: PosixStore, write_chain: WriteChain, payload_of: PayloadOf
) -> None:
    keys = write_chain(16)
    expected = {key: payload_of(key).tobytes() for key in keys}

    def read(offset: int) -> None:
        into = bytearray(768)
        for n in range(200):
            key = keys[(n * 7 + offset) % len(keys)]
            store.read(key, into)
            assert into == expected[key]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_quarantine_takes_a_block_out_of_service(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    (key,) = write_chain(1)
    raw = path_of(key).read_bytes()
    assert store.quarantine(key, BlockFault.CHECKSUM)
    assert fault_of(store, key) is BlockFault.MISSING
    assert list(store.scan()) == []
    kept = tmp_path / "store" / store.namespace.hex / "bad" / f"{key.hex()}.checksum"
    assert kept.read_bytes() == raw
    assert not store.quarantine(key, BlockFault.CHECKSUM)


def test_quarantine_is_bounded(store: PosixStore, tmp_path: Path, write_chain: WriteChain) -> None:
    for key in write_chain(MAX_QUARANTINED_FILES + 3):
        store.quarantine(key, BlockFault.IO)
    assert len(list((tmp_path / "store" / store.namespace.hex / "bad").iterdir())) == MAX_QUARANTINED_FILES


def test_delete(store: PosixStore, write_chain: WriteChain) -> None:
    first, second = write_chain(2)
    assert store.delete(first) and not store.delete(first)
    assert fault_of(store, first) is BlockFault.MISSING
    assert [record.key for record in store.scan()] == [second]


def test_scan_tells_good_from_bad(store: PosixStore, write_chain: WriteChain, path_of: PathOf) -> None:
    keys = write_chain(4)
    path_of(keys[1]).write_bytes(b"\0" * 5000)
    os.truncate(path_of(keys[2]), 10)
    misplaced = path_of(keys[3]).with_name("notes.kv")
    path_of(keys[3]).replace(misplaced)
    bad: list[BadFile] = []
    (record,) = store.scan(bad.append)
    assert (record.key, record.parent, record.payload_bytes) == (keys[0], store.namespace.root, 768)
    assert record.mtime_ns == path_of(keys[0]).stat().st_mtime_ns
    assert {(file.path, file.key, file.cause) for file in bad} == {
        (str(path_of(keys[1])), keys[1], BlockFault.HEADER),
        (str(path_of(keys[2])), keys[2], BlockFault.TRUNCATED),
        (str(misplaced), None, BlockFault.HEADER),
    }


def test_opening_removes_only_leftovers(
    store: PosixStore, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    (key,) = write_chain(1)
    child = os.fork()
    if child == 0:
        try:
            store.write(block_keys(key, range(16), 16)[0], key, bytes(768), pace=lambda _: os._exit(0))
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
    PosixStore(tmp_path / "store", store.namespace.layout, store.namespace)
    assert sorted(drafts(tmp_path)) == sorted([alive, elsewhere])
    store.read(key, bytearray(768))


def test_the_description_is_repaired_at_open(store: PosixStore, tmp_path: Path) -> None:
    path = tmp_path / "store" / store.namespace.hex / "namespace.json"
    described = msgspec.json.decode(path.read_bytes())
    assert described["namespace"] == store.namespace.hex
    assert described["model_fingerprint"] == "tiny-model" and described["layout"]["layers"] == 3
    path.write_bytes(b"{")
    PosixStore(tmp_path / "store", store.namespace.layout, store.namespace)
    assert msgspec.json.decode(path.read_bytes()) == described


def test_checks_can_be_turned_off_to_measure_them(
    tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PosixStore(tmp_path, layout, space, durable=False, verify_writes=False, verify_reads=False)
    key = block_keys(space.root, range(16), 16)[0]
    with monkeypatch.context() as patch:
        for call in ("fsync", "preadv"):
            patch.setattr(os, call, lambda *_: pytest.fail("was turned off"))
        store.write(key, space.root, payload_of(key))
    (path,) = tmp_path.rglob("*.kv")
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"wrong")
    into = bytearray(768)
    store.read(key, into)
    assert into.startswith(b"wrong")
