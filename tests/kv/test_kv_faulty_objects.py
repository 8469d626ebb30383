"""One object that its server refuses is told from a server that is away, and writes from reads."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dualpath.kv import (
    BlockError,
    BlockKey,
    BlockUnavailableError,
    Namespace,
    PrefixIndex,
    StoreError,
    StoreWriteError,
    block_keys,
    namespace,
    rebuild,
)
from dualpath.kv.stores import bucket as buckets
from dualpath.kv.stores.block_file import PAGE_BYTES
from dualpath.kv.stores.inspection import fsck, stat
from dualpath.kv.stores.objects import ObjectStore

from .faulty_objects import CUT, HANG, RESET, FaultyObjects

PayloadOf = Callable[[BlockKey], np.ndarray]
ONE_OBJECT = [403, 401, 500, 503, 429, CUT, RESET]


@pytest.fixture(autouse=True)
def _no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's retries take a second each."""
    monkeypatch.setattr(buckets, "MAX_RETRIES", 0)


@pytest.fixture
def server() -> Iterator[FaultyObjects]:
    with FaultyObjects().running() as running:
        yield running


@pytest.fixture
def keys(space: Namespace) -> list[BlockKey]:
    return block_keys(space.root, range(16 * 4), 16)


@pytest.fixture
def store(server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf) -> ObjectStore:
    opened = ObjectStore(server.bucket())
    for key, parent in zip(keys, [space.root, *keys], strict=False):
        opened.write(space, key, parent, payload_of(key))
    return opened


def read(store: ObjectStore, space: Namespace, key: BlockKey) -> bytes:
    into = bytearray(768)
    store.read(space, key, into)
    return bytes(into)


def name_of(space: Namespace, key: BlockKey) -> str:
    return f"kv/{space.hex}/{key.hex()[:2]}/{key.hex()}.kv"


@pytest.mark.parametrize("fault", ONE_OBJECT)
def test_one_object_that_is_refused(
    fault: int | str,
    store: ObjectStore,
    server: FaultyObjects,
    space: Namespace,
    keys: list[BlockKey],
    payload_of: PayloadOf,
) -> None:
    """The others are read as ever, this one is not dropped, and is there again when it is there again."""
    before = dict(server.objects)
    server.faults["GET", keys[1].hex()] = fault
    if fault != CUT:  # a look reads no body
        server.faults["HEAD", keys[1].hex()] = fault
    for _ in range(3):
        with pytest.raises(BlockUnavailableError, match=keys[1].hex()) as caught:
            read(store, space, keys[1])
        assert caught.value.key == keys[1]
        for key in (keys[0], keys[2]):
            assert read(store, space, key) == payload_of(key).tobytes()
    with pytest.raises(BlockUnavailableError):
        store.quarantine(space.root, keys[1])
    fresh = ObjectStore(server.bucket())
    report = rebuild(PrefixIndex(), fresh, clean=True)
    assert (report.published_blocks, report.orphans, report.bad) == (1, (), ())
    assert [file.key for file in report.unavailable] == [keys[1]]
    found = fsck(fresh, repair=True)
    assert [file.key for file in found.unavailable] == [keys[1]] and not found.is_repaired
    assert server.objects == before
    server.faults.clear()
    assert fsck(ObjectStore(server.bucket())).sound_blocks == 4


def test_who_asks_for_it_again_is_told_at_once(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey]
) -> None:
    server.faults["GET", keys[1].hex()] = 500
    for _ in range(5):
        with pytest.raises(BlockUnavailableError):
            read(store, space, keys[1])
    refused = server.asked["GET"]
    with pytest.raises(BlockUnavailableError, match="refused it a moment ago"):
        read(store, space, keys[1])
    assert server.asked["GET"] == refused


@pytest.mark.parametrize("fault", [403, 500, RESET])
def test_a_server_that_refuses_everything(
    fault: int | str, store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey]
) -> None:
    """No block is to blame, and a prompt of many blocks does not wait for each."""
    before = dict(server.objects)
    server.faults |= {("GET", ""): fault, ("HEAD", ""): fault}
    with pytest.raises(StoreError) as caught:
        read(store, space, keys[0])
    assert not isinstance(caught.value, BlockUnavailableError)
    asked = server.asked.total()
    for key in keys:
        with pytest.raises(StoreError, match="did not answer a moment ago") as caught:
            read(store, space, key)
        assert not isinstance(caught.value, BlockUnavailableError)
    assert server.asked.total() == asked and server.objects == before


@pytest.mark.parametrize("fault", [403, 507, RESET])
def test_refused_writes_do_not_speak_against_reads(
    fault: int | str,
    store: ObjectStore,
    server: FaultyObjects,
    space: Namespace,
    keys: list[BlockKey],
    payload_of: PayloadOf,
) -> None:
    server.faults["PUT", ""] = fault
    new = block_keys(keys[-1], range(16 * 3), 16)
    for key in new:
        with pytest.raises(StoreWriteError):
            store.write(space, key, keys[-1], payload_of(key))
        assert read(store, space, keys[0]) == payload_of(keys[0]).tobytes()
        assert len(store.find(space.root, keys)) == 4
    asked = server.asked["PUT"]
    with pytest.raises(StoreWriteError, match="refused other objects a moment ago"):
        store.write(space, new[2], keys[-1], payload_of(new[2]))
    assert server.asked["PUT"] == asked, "a disk that is full is not sent a block each time"


def test_one_refused_write_does_not_speak_against_others(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf
) -> None:
    one, other = block_keys(keys[-1], range(16 * 2), 16)
    server.faults["PUT", one.hex()] = 403
    for _ in range(3):
        with pytest.raises(StoreWriteError):
            store.write(space, one, keys[-1], payload_of(one))
        store.write(space, other, keys[-1], payload_of(other))
        assert store.delete(space.root, other)


def test_a_write_that_can_not_be_read_back_takes_nothing_away(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf
) -> None:
    """What was acknowledged before is still there, whatever the server says of it now."""
    server.faults["GET", keys[1].hex()] = 500
    with pytest.raises(StoreWriteError):
        store.write(space, keys[1], keys[0], payload_of(keys[1]))
    server.faults.clear()
    assert read(ObjectStore(server.bucket()), space, keys[1]) == payload_of(keys[1]).tobytes()


def test_a_description_that_is_refused_is_none(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf
) -> None:
    """In one namespace; others, and all blocks, are as ever."""
    other = namespace("other", "1", space.layout)
    (apart,) = block_keys(other.root, range(16), 16)
    store.write(other, apart, other.root, payload_of(apart))
    for method in ("GET", "PUT", "HEAD"):
        server.faults[method, f"{space.hex}/namespace.json"] = 403
    again = ObjectStore(server.bucket())
    again.prepare(space)
    assert again.descriptions()[space.root] is None and again.descriptions()[other.root] is not None
    assert stat(again).blocks == 5
    report = fsck(again)
    assert (report.sound_blocks, report.undescribed) == (5, (space.hex,))
    (new,) = block_keys(keys[-1], range(16), 16)
    again.write(space, new, keys[-1], payload_of(new))
    server.objects[f"kv/{other.hex}/namespace.json"] = b'{"namespace": "\xff"}'
    assert again.descriptions()[other.root] is None


def test_a_shard_that_can_not_be_listed_makes_no_orphans(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey]
) -> None:
    before = dict(server.objects)
    server.faults["PROPFIND", f"{space.hex}/{keys[1].hex()[:2]}"] = 500
    server.faults["PROPFIND", f"{space.hex}/bad"] = 500
    report = rebuild(PrefixIndex(), ObjectStore(server.bucket()), clean=True)
    assert (report.orphans, report.bad, len(report.unavailable)) == ((), (), 1)
    assert fsck(ObjectStore(server.bucket()), repair=True).orphans == ()
    assert server.objects == before


def test_the_last_block_takes_the_namespace_with_it(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf
) -> None:
    """Whoever wrote it; and a delete of another block costs no list."""
    for number in range(100):
        store.prepare(namespace("tiny-model", "1", space.layout, f"tenant {number}"))
    server.objects[name_of(space, keys[3])] = b"half"
    assert store.quarantine(space.root, keys[3]) is not None
    coordinator = ObjectStore(server.bucket())
    assert len(list(coordinator.scan())) == 3
    lists = server.asked["PROPFIND"]
    last = coordinator._spaces._known_block[space.root]
    for key in [key for key in keys[:3] if key != last]:
        assert coordinator.delete(space.root, key)
    assert server.asked["PROPFIND"] == lists and len(server.objects) == 3
    assert coordinator.delete(space.root, last)
    assert server.objects == {}
    store.write(space, keys[0], space.root, payload_of(keys[0]))
    assert read(coordinator, space, keys[0]) == payload_of(keys[0]).tobytes()


def test_abandoned_descriptions_are_leftovers(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = namespace("tiny-model", "1", space.layout, "somebody")
    server.objects[f"kv/{empty.hex}/namespace.json"] = b"{}"
    assert store.leftovers() == [], "a writer may be about to put its first block"
    monkeypatch.setattr("dualpath.kv.stores.object_namespaces.LEFTOVER_AGE_S", -60.0)
    assert store.leftovers() == [empty.hex]
    assert rebuild(PrefixIndex(), store, clean=True).published_blocks == 4
    assert not any(empty.hex in name for name in server.objects) and store.leftovers() == []


def test_a_known_object_that_is_refused_is_not_what_is_asked_for(
    store: ObjectStore, server: FaultyObjects, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf
) -> None:
    """A server that says 403 for what does not exist is asked for what it gave before."""
    read(store, space, keys[0])
    server.faults |= {("GET", buckets.PROBE): 403, ("GET", keys[1].hex()): 403}
    with pytest.raises(BlockUnavailableError):
        read(store, space, keys[1])
    assert read(store, space, keys[2]) == payload_of(keys[2]).tobytes()
    assert len(server.objects[name_of(space, keys[2])]) == PAGE_BYTES + 768
    with pytest.raises(BlockError, match="missing"):
        read(store, space, b"0" * 16)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("method", ["PROPFIND", "GET"])
def test_a_command_ends_when_it_is_told_to(
    sent: signal.Signals, code: int, method: str, store: ObjectStore, server: FaultyObjects
) -> None:
    """Also while it waits for a server that hangs: Python's own way would end with the last request, in a minute."""
    server.faults[method, ""] = HANG
    server.asked.clear()
    ignored = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{ignored}; from dualpath.cli import main; sys.exit(main(['store', 'fsck', {server.url!r}]))"
    process = subprocess.Popen([sys.executable, "-c", run], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not server.asked[method]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code and b"Traceback" not in said
    assert sent is signal.SIGTERM or b"interrupted" in said
