"""What every store promises: files of a file system, objects through obstore, objects behind a real server."""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import obstore
import pytest
from obstore.store import LocalStore

from dualpath.kv import (
    BadFile,
    BlockError,
    BlockFault,
    BlockKey,
    KVLayout,
    KVPart,
    Namespace,
    PosixStore,
    Store,
    block_keys,
    namespace,
)
from dualpath.kv.stores import conformance
from dualpath.kv.stores.block_file import CHUNK_BYTES, PAGE_BYTES
from dualpath.kv.stores.bucket import Bucket
from dualpath.kv.stores.naming import MAX_QUARANTINED_FILES
from dualpath.kv.stores.objects import ObjectStore
from dualpath.lab.testbed.object_server import ObjectServer, free_port, missing_parts

PayloadOf = Callable[[BlockKey], np.ndarray]
PathOf = Callable[[BlockKey], Path]
WriteChain = Callable[..., list[BlockKey]]
OpenStore = Callable[[], Store]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    missing = missing_parts()
    if missing is not None:
        pytest.skip(missing)
    home = tmp_path_factory.mktemp("objects")
    with ObjectServer(home, tmp_path_factory.mktemp("nginx"), port=free_port()) as running:
        yield running


@pytest.fixture(params=["files", "objects", "server"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens stores whose blocks lie as files below ``tmp_path/store``, whatever keeps them."""
    home = tmp_path / "store"
    if request.param == "files":
        return lambda: PosixStore(home)
    home.mkdir()
    if request.param == "objects":
        bucket = Bucket(LocalStore(home), f"file://{home}")
    else:
        server = request.getfixturevalue("server")
        link = server.directory / f"{os.getpid()}-{tmp_path.name}"
        link.symlink_to(home)
        bucket = Bucket.open(f"{server.url}/{link.name}")
    return lambda: ObjectStore(bucket)


@pytest.fixture
def store(open_store: OpenStore, layout: KVLayout, space: Namespace) -> Store:
    return open_store()


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_what_every_store_must_do(open_store: OpenStore, check: Callable[[OpenStore], None]) -> None:
    check(open_store)


@pytest.mark.parametrize("check", conformance.FAULT_CHECKS, ids=lambda check: check.__name__)
def test_what_every_store_must_do_about_faults(
    open_store: OpenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check: Callable[[OpenStore, conformance.Unreadable], None],
) -> None:
    @contextmanager
    def unreadable(key: BlockKey) -> Iterator[None]:
        """Files fail to open; objects are refused: the server may not read the file, or the library says so."""
        opening, getting, heading = os.open, obstore.get, obstore.head

        def refuse(name: object) -> None:
            if key.hex() in str(name) and "tmp" not in Path(str(name)).name:
                raise PermissionError(errno.EIO, "an error that is no fault of the block")

        def os_open(path: object, *arguments: int, **options: int) -> int:
            refuse(path)
            return opening(path, *arguments, **options)  # type: ignore[arg-type]

        def get(objects: object, name: str, **options: object) -> object:
            refuse(name)
            return getting(objects, name, **options)  # type: ignore[arg-type]

        def head(objects: object, name: str) -> object:
            refuse(name)
            return heading(objects, name)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            for where, what, instead in ((os, "open", os_open), (obstore, "get", get), (obstore, "head", head)):
                patch.setattr(where, what, instead)
            yield

    monkeypatch.setattr("dualpath.kv.stores.bucket.COOL_S", 0.0)
    check(open_store, unreadable)


def drafts(directory: Path) -> list[Path]:
    return list(directory.rglob("*.tmp"))


def fault_of(store: Store, space: Namespace, key: BlockKey) -> BlockFault:
    with pytest.raises(BlockError) as caught:
        store.read(space, key, bytearray(space.layout.full_block_bytes))
    assert caught.value.key == key
    assert key.hex() in str(caught.value)
    return caught.value.cause


def test_round_trip(
    store: Store, write_chain: WriteChain, payload_of: PayloadOf, path_of: PathOf, space: Namespace
) -> None:
    for key in write_chain(3):
        into = bytearray(space.layout.full_block_bytes)
        store.read(space, key, into)
        assert into == payload_of(key).tobytes()
        raw = path_of(key).read_bytes()
        assert raw[PAGE_BYTES:] == bytes(into), "the payload starts on a page and nothing follows it"


def test_any_contiguous_memory_of_the_right_size_will_do(store: Store, payload_of: PayloadOf, space: Namespace) -> None:
    key = block_keys(space.root, range(16), 16)[0]
    payload = payload_of(key)
    store.write(space, key, space.root, payload.view(np.float16).reshape(3, 16, 8))
    into = np.zeros((3, 128), dtype=np.uint16)
    store.read(space, key, into)
    assert into.tobytes() == payload.tobytes()
    wide = np.zeros((768, 2), dtype=np.uint8)
    for wrong in (bytearray(767), bytearray(769), wide[:, 0]):
        with pytest.raises(ValueError, match="768 contiguous bytes"):
            store.read(space, key, wrong)
        with pytest.raises(ValueError, match="768 contiguous bytes"):
            store.write(space, key, space.root, wrong)
    with pytest.raises(ValueError, match="writable memory"):
        store.read(space, key, bytes(768))
    with pytest.raises(ValueError, match="keys have 16 bytes"):
        store.write(space, b"short", space.root, payload)


@pytest.mark.parametrize("layers", [501, 502, 1100])
def test_many_layers_grow_the_header_by_pages(
    open_store: OpenStore, tmp_path: Path, layers: int, space: Namespace
) -> None:
    layout = KVLayout.alike(layers, (KVPart("k", 1, 1),), "float16", block_tokens=1)
    store, space = open_store(), namespace("deep", "1", layout)
    key = block_keys(space.root, [1], 1)[0]
    payload = bytes(n % 251 for n in range(layout.full_block_bytes))
    store.write(space, key, space.root, payload)
    (path,) = tmp_path.rglob("*.kv")
    header_bytes = {501: 4096, 502: 8192, 1100: 12288}[layers]
    assert path.read_bytes()[header_bytes:] == payload
    into = bytearray(layout.full_block_bytes)
    store.read(space, key, into)
    assert into == payload
    for length, cause in ((header_bytes - 1, BlockFault.TRUNCATED), (0, BlockFault.TRUNCATED)):
        os.truncate(path, length)
        assert fault_of(store, space, key) is cause


def test_the_message_names_the_layer(store: Store, write_chain: WriteChain, path_of: PathOf, space: Namespace) -> None:
    (key,) = write_chain(1)
    with path_of(key).open("r+b") as file:
        file.seek(PAGE_BYTES + 2 * 256)
        file.write(b"wrong")
    with pytest.raises(BlockError, match="checksum: layer 2 does not match"):
        store.read(space, key, bytearray(768))


def test_truncated_missing_and_overlong_files(
    store: Store, write_chain: WriteChain, path_of: PathOf, space: Namespace
) -> None:
    (key,) = write_chain(1)
    path = path_of(key)
    with path.open("ab") as file:
        file.write(b"!")
    assert fault_of(store, space, key) is BlockFault.HEADER
    for length in (PAGE_BYTES + 767, PAGE_BYTES, PAGE_BYTES - 1, 1, 0):
        os.truncate(path, length)
        assert fault_of(store, space, key) is BlockFault.TRUNCATED, f"{length} bytes"
    path.unlink()
    assert fault_of(store, space, key) is BlockFault.MISSING


def test_a_file_of_another_key_namespace_or_version(
    store: Store,
    open_store: OpenStore,
    tmp_path: Path,
    write_chain: WriteChain,
    path_of: PathOf,
    payload_of: PayloadOf,
    space: Namespace,
) -> None:
    mine, other = write_chain(2)
    path_of(other).replace(path_of(mine))
    assert fault_of(store, space, mine) is BlockFault.HEADER

    stranger = namespace("other", "1", space.layout)
    store.write(stranger, mine, stranger.root, payload_of(mine))
    foreign = tmp_path / "store" / stranger.hex / mine.hex()[:2] / f"{mine.hex()}.kv"
    foreign.replace(path_of(mine))
    with pytest.raises(BlockError, match=f"header: the file is of namespace {stranger.hex}"):
        store.read(space, mine, bytearray(768))

    raw = bytearray(path_of(mine).read_bytes())
    raw[8:12] = struct.pack("<I", 2)
    path_of(mine).write_bytes(raw)
    with pytest.raises(BlockError, match="format version 2, this program reads version 1"):
        store.read(space, mine, bytearray(768))


def test_a_block_of_another_geometry(
    open_store: OpenStore, store: Store, payload_of: PayloadOf, space: Namespace
) -> None:
    """Only a forged namespace can do this; the geometry is checked all the same before bytes go into a buffer."""
    layout = KVLayout.alike(6, (KVPart("k", 1, 4),), "float16", block_tokens=16)
    forged = msgspec.structs.replace(space, layout=layout)
    key = block_keys(space.root, range(16), 16)[0]
    open_store().write(forged, key, forged.root, payload_of(key))
    with pytest.raises(BlockError, match="6 layers of 128 bytes instead of 3 layers of 256"):
        store.read(space, key, bytearray(768))


def test_a_valid_block_is_left_alone_and_a_damaged_one_replaced(
    store: Store, write_chain: WriteChain, path_of: PathOf, payload_of: PayloadOf, space: Namespace
) -> None:
    (key,) = write_chain(1)
    before = path_of(key).stat()
    again = store.write(space, key, space.root, payload_of(key), pace=lambda _: pytest.fail("nothing to write"))
    after = path_of(key).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [record.physical_bytes for record in store.scan()] == [again]
    with path_of(key).open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"wrong")
    assert fault_of(store, space, key) is BlockFault.CHECKSUM
    store.write(space, key, space.root, payload_of(key))
    store.read(space, key, bytearray(768))


def test_pace_sees_every_payload_byte_in_small_chunks(open_store: OpenStore, space: Namespace) -> None:
    layout = KVLayout.alike(3, (KVPart("k", 1, 1500),), "float32", block_tokens=256)
    store, space = open_store(), namespace("wide", "1", layout)
    key = block_keys(space.root, range(256), 256)[0]
    payload = np.random.default_rng(1).integers(0, 256, layout.full_block_bytes, dtype=np.uint8)
    into = np.zeros_like(payload)
    written: list[int] = []
    read: list[int] = []
    store.write(space, key, space.root, payload, pace=written.append)
    store.read(space, key, into, pace=read.append)
    assert (into == payload).all()
    assert sum(written) == sum(read) == layout.full_block_bytes
    assert max(written) == CHUNK_BYTES >= max(read) and len(written) == 5 <= len(read)


def test_what_pace_raises_is_passed_on_and_leaves_nothing(
    store: Store, tmp_path: Path, payload_of: PayloadOf, space: Namespace
) -> None:
    """TimeoutError is an OSError: a caller's deadline must not look like a fault of the disk."""

    def late(_n_bytes: int) -> None:
        raise TimeoutError("deadline")

    key = block_keys(space.root, range(16), 16)[0]
    with pytest.raises(TimeoutError, match="deadline"):
        store.write(space, key, space.root, payload_of(key), pace=late)
    assert drafts(tmp_path) == [] and fault_of(store, space, key) is BlockFault.MISSING
    store.write(space, key, space.root, payload_of(key))
    with pytest.raises(TimeoutError, match="deadline"):
        store.read(space, key, bytearray(768), pace=late)


def test_concurrent_writers_of_one_key(
    open_store: OpenStore, tmp_path: Path, layout: KVLayout, space: Namespace, payload_of: PayloadOf
) -> None:
    keys = block_keys(space.root, range(64), 16)
    barrier = threading.Barrier(8)

    def write(_writer: int) -> list[int]:
        store = open_store()
        barrier.wait(timeout=60)
        above = [space.root, *keys]
        return [store.write(space, key, parent, payload_of(key)) for parent, key in zip(above, keys, strict=False)]

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(write, range(8)))
    assert all(size == sizes[0] for size in sizes)
    store = open_store()
    assert sorted(record.key for record in store.scan()) == sorted(keys)
    assert drafts(tmp_path) == []
    for key in keys:
        into = bytearray(768)
        store.read(space, key, into)
        assert into == payload_of(key).tobytes()


def test_one_store_read_by_many_threads_at_once(
    store: Store, write_chain: WriteChain, payload_of: PayloadOf, space: Namespace
) -> None:
    keys = write_chain(16)
    expected = {key: payload_of(key).tobytes() for key in keys}

    def read(offset: int) -> None:
        into = bytearray(768)
        for n in range(200):
            key = keys[(n * 7 + offset) % len(keys)]
            store.read(space, key, into)
            assert into == expected[key]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def damage(path: Path) -> bytes:
    """Change the payload; the file's bytes then."""
    with path.open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(b"wrong")
    return path.read_bytes()


def test_quarantine_takes_a_bad_block_out_of_service(
    store: Store, space: Namespace, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    (key,) = write_chain(1)
    assert store.quarantine(space.root, key) is None, "it is sound"
    store.read(space, key, bytearray(768))
    raw = damage(path_of(key))
    assert store.quarantine(space.root, key) is BlockFault.CHECKSUM
    assert fault_of(store, space, key) is BlockFault.MISSING
    assert list(store.scan()) == []
    kept = tmp_path / "store" / space.hex / "bad" / f"{key.hex()}.checksum"
    assert kept.read_bytes() == raw
    assert store.quarantine(space.root, key) is None, "it is gone"


def test_quarantine_is_bounded(
    store: Store, space: Namespace, tmp_path: Path, write_chain: WriteChain, path_of: PathOf
) -> None:
    for key in write_chain(MAX_QUARANTINED_FILES + 3):
        damage(path_of(key))
        store.quarantine(space.root, key)
    assert len(list((tmp_path / "store" / space.hex / "bad").iterdir())) == MAX_QUARANTINED_FILES


def test_delete(store: Store, write_chain: WriteChain, space: Namespace) -> None:
    first, second = write_chain(2)
    assert store.delete(space.root, first) and not store.delete(space.root, first)
    assert fault_of(store, space, first) is BlockFault.MISSING
    assert [record.key for record in store.scan()] == [second]


def test_scan_tells_good_from_bad(store: Store, write_chain: WriteChain, path_of: PathOf, space: Namespace) -> None:
    keys = write_chain(4)
    path_of(keys[1]).write_bytes(b"\0" * 5000)
    os.truncate(path_of(keys[2]), 10)
    misplaced = path_of(keys[3]).with_name("notes.kv")
    path_of(keys[3]).replace(misplaced)
    bad: list[BadFile] = []
    (record,) = store.scan(bad.append)
    assert (record.key, record.parent, record.payload_bytes) == (keys[0], space.root, 768)
    assert record.mtime_ns // 10**9 == path_of(keys[0]).stat().st_mtime_ns // 10**9
    assert {(Path(file.path).name, file.key, file.cause) for file in bad} == {
        (path_of(keys[1]).name, keys[1], BlockFault.HEADER),
        (path_of(keys[2]).name, keys[2], BlockFault.TRUNCATED),
        (misplaced.name, None, BlockFault.HEADER),
    }
