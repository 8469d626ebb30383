"""Conformance checks for every store, ours and other packages': functions that raise AssertionError on a violation.

Each takes a function that opens the same store, empty at first, as a separate process would. With pytest::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_store(check, tmp_path):
        check(lambda: MyStore(f"mine://{tmp_path}", durable=True))

They can't test a power cut or a damaged medium: test those with the store's own means. `FAULT_CHECKS` also take
``unreadable(key)``: a context in which the store can't read that block, for a reason that says nothing about its bytes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from hashlib import shake_128

from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout, KVPart, LayerKV
from dualpath.kv.rebuild import rebuild
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError
from dualpath.kv.stores.inspection import fsck
from dualpath.kv.stores.protocol import Inspectable, Store

OpenStore = Callable[[], Store]
Unreadable = Callable[[BlockKey], AbstractContextManager[None]]

LAYOUT = KVLayout.alike(3, (KVPart("k", 2, 64), KVPart("v", 2, 64)), "float32", block_tokens=1024)
"""Blocks of 3 MiB: more than one chunk."""
DIFFERING = KVLayout.of(
    [LayerKV((KVPart("k", heads, 64), KVPart("v", heads, 64)), window) for heads, window in ((2, None), (4, 512))] * 2,
    "float32",
    block_tokens=512,
)
"""Blocks of 3 MiB in layers of 512 KiB and 1 MiB, the larger ones with a window."""
SPACE = namespace("conformance", "1", LAYOUT)
OTHER = namespace("conformance", "1", LAYOUT, tenant_salt="another")
KEYS = block_keys(SPACE.root, range(4 * 1024), 1024)


def payload_of(key: BlockKey) -> bytes:
    """Returns a payload derived from the key."""
    return shake_128(key).digest(LAYOUT.full_block_bytes)


def read(store: Store, space: Namespace, key: BlockKey) -> bytes | BlockFault:
    """Returns a block's bytes, or what is wrong with it."""
    into = bytearray(LAYOUT.full_block_bytes)
    try:
        store.read(space, key, into)
    except BlockError as error:
        assert error.key == key
        return error.cause
    return bytes(into)


def write_chain(store: Store, blocks: int) -> list[int]:
    """Write the first blocks of `KEYS`, each after its parent. Returns their sizes in the store."""
    chain = list(zip([SPACE.root, *KEYS], KEYS, strict=False))[:blocks]
    return [store.write(SPACE, key, parent, payload_of(key)) for parent, key in chain]


def what_one_process_writes_another_finds_and_reads(opened: OpenStore) -> None:
    opened().prepare(SPACE)
    sizes = write_chain(opened(), 3)
    other = opened()
    assert [read(other, SPACE, key) for key in KEYS[:3]] == [payload_of(key) for key in KEYS[:3]]
    found = other.find(SPACE.root, KEYS)
    assert [(one.root, one.key, one.parent) for one in found] == [
        (SPACE.root, key, parent) for parent, key in zip([SPACE.root, *KEYS], KEYS[:3], strict=False)
    ]
    assert [one.physical_bytes for one in found] == sizes
    assert all(one.payload_bytes == LAYOUT.full_block_bytes and one.physical_bytes > 0 for one in found)
    assert sorted(one.key for one in other.scan()) == sorted(KEYS[:3])


def what_is_not_there_is_missing(opened: OpenStore) -> None:
    store = opened()
    store.prepare(SPACE)
    assert read(store, SPACE, KEYS[0]) is BlockFault.MISSING
    assert store.find(SPACE.root, KEYS) == [] and store.find(SPACE.root, []) == []
    assert not store.delete(SPACE.root, KEYS[0])
    assert store.quarantine(SPACE.root, KEYS[0]) is None
    assert list(store.scan()) == []


def a_find_ends_at_the_first_missing_block(opened: OpenStore) -> None:
    store = opened()
    write_chain(store, 4)
    assert store.delete(SPACE.root, KEYS[2]) and not store.delete(SPACE.root, KEYS[2])
    assert [one.key for one in store.find(SPACE.root, KEYS)] == KEYS[:2]
    write_chain(store, 4)
    assert [one.key for one in store.find(SPACE.root, KEYS)] == KEYS, "it can be written again"


def namespaces_share_nothing(opened: OpenStore) -> None:
    store = opened()
    write_chain(store, 1)
    assert read(store, OTHER, KEYS[0]) is BlockFault.MISSING
    assert store.find(OTHER.root, KEYS) == [] and not store.delete(OTHER.root, KEYS[0])
    assert read(store, SPACE, KEYS[0]) == payload_of(KEYS[0])


def a_namespace_without_blocks_leaves_nothing(opened: OpenStore) -> None:
    """A tenant that stores nothing, or whose last block is gone, costs no file: there may be millions."""
    store = opened()
    store.prepare(OTHER)
    if isinstance(store, Inspectable):
        assert OTHER.root not in store.descriptions()
    write_chain(store, 2)
    assert store.delete(SPACE.root, KEYS[1]) and store.delete(SPACE.root, KEYS[0])
    if isinstance(store, Inspectable):
        assert not any(store.descriptions().values()) and store.quarantined(SPACE.root) == 0
    write_chain(store, 1)
    assert read(store, SPACE, KEYS[0]) == payload_of(KEYS[0]), "it can come back"


def a_sound_block_is_left_alone(opened: OpenStore) -> None:
    store = opened()
    sizes = write_chain(store, 1)
    (before,) = store.scan()
    assert write_chain(store, 1) == sizes
    assert store.quarantine(SPACE.root, KEYS[0]) is None, "nothing is wrong with it"
    assert list(store.scan()) == [before]


def pace_sees_every_payload_byte(opened: OpenStore) -> None:
    store = opened()
    written: list[int] = []
    taken: list[int] = []
    store.write(SPACE, KEYS[0], SPACE.root, payload_of(KEYS[0]), written.append)
    store.read(SPACE, KEYS[0], bytearray(LAYOUT.full_block_bytes), taken.append)
    assert sum(written) == sum(taken) == LAYOUT.full_block_bytes
    assert max(*written, *taken) <= 1 << 20, "in pieces small enough to pace"


def layers_can_be_read_apart(opened: OpenStore) -> None:
    """The sizes of layers may differ; what is read of layers that were not asked for does not matter."""
    store = opened()
    for layout in (LAYOUT, DIFFERING):
        space = namespace("conformance", "apart", layout)
        (key,) = block_keys(space.root, range(layout.block_tokens), layout.block_tokens)
        payload = shake_128(key).digest(layout.full_block_bytes)
        store.write(space, key, space.root, payload)
        for layers in ((), (0,), (1,), (0, 2), (1, 2), tuple(range(layout.layers)), None):
            into, taken = bytearray(len(payload)), [0]
            store.read(space, key, into, taken.append, layers)
            wanted = [layout.layer_range(layer) for layer in (range(layout.layers) if layers is None else layers)]
            assert all(into[start:stop] == payload[start:stop] for start, stop in wanted), layers
            assert sum(stop - start for start, stop in wanted) <= sum(taken) <= len(payload), layers
        assert store.quarantine(space.root, key) is None, "nothing is wrong with it"


def what_pace_raises_ends_a_write_without_a_trace(opened: OpenStore) -> None:
    class GivenUpError(OSError):
        pass

    def give_up(_n_bytes: int) -> None:
        raise GivenUpError

    store = opened()
    try:
        store.write(SPACE, KEYS[0], SPACE.root, payload_of(KEYS[0]), give_up)
    except GivenUpError:
        pass
    else:
        raise AssertionError("what pace raised was not passed on")
    assert list(store.scan()) == [] and read(store, SPACE, KEYS[0]) is BlockFault.MISSING


def wrong_sizes_and_keys_are_refused(opened: OpenStore) -> None:
    store = opened()
    short = bytearray(LAYOUT.full_block_bytes - 1)
    for wrong in (
        lambda: store.read(SPACE, KEYS[0], short),
        lambda: store.write(SPACE, KEYS[0], SPACE.root, short),
        lambda: store.write(SPACE, b"short", SPACE.root, payload_of(KEYS[0])),
    ):
        try:
            wrong()
        except ValueError:
            continue
        raise AssertionError("no ValueError was raised")


def many_threads_may_write_and_read_at_once(opened: OpenStore) -> None:
    store = opened()
    with ThreadPoolExecutor(4) as threads:
        sizes = list(threads.map(lambda _: write_chain(store, 2), range(4)))
        assert all(size == sizes[0] for size in sizes)
        assert set(threads.map(lambda n: read(store, SPACE, KEYS[n % 2]), range(16))) == set(map(payload_of, KEYS[:2]))
    assert len(list(store.scan())) == 2


def one_that_can_be_inspected_describes_its_namespaces(opened: OpenStore) -> None:
    store = opened()
    if isinstance(store, Inspectable):
        store.prepare(SPACE)
        write_chain(store, 1)
        described = store.descriptions()[SPACE.root]
        assert described is not None and described.layout == LAYOUT
        store.verify(SPACE.root, KEYS[0])
        assert store.quarantined(SPACE.root) == 0 and store.leftovers() == []


def a_block_that_cannot_be_read_now_is_left_alone(opened: OpenStore, unreadable: Unreadable) -> None:
    store = opened()
    write_chain(store, 3)
    with unreadable(KEYS[1]):
        for touch in (
            lambda: store.read(SPACE, KEYS[1], bytearray(LAYOUT.full_block_bytes)),
            lambda: store.find(SPACE.root, KEYS[1:]),
            lambda: store.quarantine(SPACE.root, KEYS[1]),
        ):
            try:
                touch()
            except BlockUnavailableError as error:
                assert error.key == KEYS[1]
            else:
                raise AssertionError("no BlockUnavailableError was raised")
        assert read(store, SPACE, KEYS[0]) == payload_of(KEYS[0]), "other blocks are not affected"
        assert [one.key for one in store.find(SPACE.root, KEYS)] == KEYS[:1], "what was found before it counts"
        report = rebuild(PrefixIndex(), store, clean=True)
        assert (report.published_blocks, report.orphans, report.bad) == (1, (), ())
        assert [file.key for file in report.unavailable] == [KEYS[1]]
        if isinstance(store, Inspectable):
            found = fsck(store, repair=True)
            assert not found.is_clean and not found.is_repaired and not found.bad_files and not found.orphans
    assert [read(store, SPACE, key) for key in KEYS[:3]] == [payload_of(key) for key in KEYS[:3]]
    assert rebuild(PrefixIndex(), store).published_blocks == 3


CHECKS: tuple[Callable[[OpenStore], None], ...] = (
    what_one_process_writes_another_finds_and_reads,
    what_is_not_there_is_missing,
    a_find_ends_at_the_first_missing_block,
    namespaces_share_nothing,
    a_namespace_without_blocks_leaves_nothing,
    a_sound_block_is_left_alone,
    pace_sees_every_payload_byte,
    layers_can_be_read_apart,
    what_pace_raises_ends_a_write_without_a_trace,
    wrong_sizes_and_keys_are_refused,
    many_threads_may_write_and_read_at_once,
    one_that_can_be_inspected_describes_its_namespaces,
)

FAULT_CHECKS: tuple[Callable[[OpenStore, Unreadable], None], ...] = (a_block_that_cannot_be_read_now_is_left_alone,)
