"""A namespace has folders only while it has blocks, whoever writes and deletes at once; and they are their owner's."""

import itertools
import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import BlockKey, KVLayout, KVPart, Namespace, PosixStore, PrefixIndex, block_keys, namespace, rebuild
from dualpath.kv.stores.errors import BlockFault
from dualpath.kv.stores.inspection import fsck
from dualpath.kv.stores.naming import bad_name
from dualpath.kv.stores.posix_directory import StoreDirectory
from dualpath.kv.stores.posix_namespaces import MAX_SETTLED, NamespaceFolders

PathOf = Callable[[BlockKey], Path]
PayloadOf = Callable[[BlockKey], np.ndarray]
WriteChain = Callable[..., list[BlockKey]]

LAYOUT = KVLayout.alike(2, (KVPart("kv", 1, 4),), "float32", block_tokens=16)
PAYLOAD = bytes(LAYOUT.full_block_bytes)


def tenant(number: int) -> Namespace:
    return namespace("tiny-model", "1", LAYOUT, f"tenant {number}")


def first_key(space: Namespace, number: int = 0) -> BlockKey:
    return block_keys(space.root, range(number, number + 16), 16)[0]


def names(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


def test_a_tenant_that_stores_nothing_leaves_nothing(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    for number in range(1000):
        space = tenant(number)
        store.prepare(space)
        assert store.find(space.root, [first_key(space)]) == []
    assert names(tmp_path) == []


def test_the_last_block_takes_the_folder_with_it(
    store: PosixStore, tmp_path: Path, space: Namespace, write_chain: WriteChain, path_of: PathOf
) -> None:
    keys = write_chain(5)
    path_of(keys[4]).write_bytes(b"half")
    assert store.quarantine(space.root, keys[4]) is not None
    other = tenant(1)
    store.write(other, first_key(other), other.root, PAYLOAD)
    for key in reversed(keys[1:4]):
        assert store.delete(space.root, key)
        assert store.descriptions()[space.root] is not None
    assert store.delete(space.root, keys[0])
    assert [path.name for path in (tmp_path / "store").iterdir()] == [other.hex], "the quarantined block, too"
    assert write_chain(5) == keys and fsck(store).is_clean, "it can come back"


@pytest.mark.parametrize("what", ["draft", "note", "folder"])
def test_what_somebody_keeps_in_it_holds_the_folder(
    what: str, store: PosixStore, tmp_path: Path, space: Namespace, write_chain: WriteChain, path_of: PathOf
) -> None:
    (key,) = write_chain(1)
    held = {
        "draft": path_of(key).with_name(".x.kv.00000000.1.abcd.tmp"),
        "note": path_of(key).parents[1] / "README",
        "folder": path_of(key).parents[1] / "namespace.json" / "file",
    }[what]
    if what == "folder":
        held.parent.unlink()
        held.parent.mkdir()
    held.touch()
    assert store.delete(space.root, key)
    assert held.exists()
    assert what == "folder" or store.descriptions()[space.root] is not None, "described again"
    write_chain(1)
    assert fsck(store).sound_blocks == 1


def at_every_step(
    act: Callable[[], None], meanwhile: Callable[[], None], after: Callable[[int], None], patch: pytest.MonkeyPatch
) -> int:
    """`act` again and again, with `meanwhile` before its first, second, … system call. Returns how many it has."""
    for step in range(200):
        if interrupted(act, {step: meanwhile}, patch) <= step:
            return step
        after(step)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("during", ["remover", "writer", "writer, and another has begun"])
def test_a_block_that_comes_while_its_namespace_goes(
    during: str,
    store: PosixStore,
    tmp_path: Path,
    space: Namespace,
    payload_of: PayloadOf,
    write_chain: WriteChain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer comes between any two system calls of a removal, or a removal between any two of a writer."""
    other = PosixStore(tmp_path / "store")
    key, late = first_key(space), first_key(space, 5)
    write_chain(1)

    def remove() -> None:
        store.delete(space.root, key)
        if "another" in during:
            (tmp_path / "store" / space.hex / late.hex()[:2]).mkdir(parents=True, exist_ok=True)

    def write() -> None:
        other.write(space, late, space.root, payload_of(late))

    def check(step: int) -> None:
        into = bytearray(768)
        store.read(space, late, into)
        assert into == payload_of(late).tobytes()
        assert fsck(store).is_clean, f"step {step}: described, and no orphan"
        assert store.delete(space.root, late)
        store.delete(space.root, key)
        assert names(tmp_path / "store") == []
        write_chain(1)

    acts = (remove, write) if during == "remover" else (write, remove)
    assert at_every_step(*acts, check, monkeypatch) >= 7


def test_a_folder_that_goes_and_comes_back_under_a_writer(
    store: PosixStore, tmp_path: Path, space: Namespace, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any system call of a writer the namespace's last block goes; before any later one another comes.

    The folder that is there again must not be taken for what was in its place, and set aside with the block in it.
    """
    other = PosixStore(tmp_path / "store")
    keys = (first_key(space, number) for number in range(10_000))
    goes, comes, late = itertools.islice((key for key in keys if key.hex().startswith("5a")), 3)  # one shard

    def write(key: BlockKey) -> None:
        other.write(space, key, space.root, payload_of(key))

    def run(gone: int, back: int) -> int:
        write(goes)
        meanwhile = {gone: lambda: other.delete(space.root, goes), back: lambda: write(comes)}
        calls = interrupted(lambda: store.write(space, late, space.root, payload_of(late)), meanwhile, monkeypatch)
        for key in (late, comes)[: 2 if back < calls else 1]:
            other.read(space, key, bytearray(768))
            assert other.delete(space.root, key), f"gone before call {gone}, back before {back}"
        return calls

    calls = run(1000, 1000)
    for gone, back in itertools.combinations(range(calls), 2):
        run(gone, back)


def test_a_block_that_is_mended_while_it_is_judged_stays(
    store: PosixStore, space: Namespace, write_chain: WriteChain, path_of: PathOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = write_chain(1)
    path_of(key).write_bytes(b"half")
    verify = store.verify

    def judge(root: bytes, judged: bytes) -> None:
        try:
            verify(root, judged)
        finally:
            path_of(key).unlink()
            write_chain(1)

    with monkeypatch.context() as patch:
        patch.setattr(store, "verify", judge)
        assert store.quarantine(space.root, key) is None
    store.verify(space.root, key)
    assert store.quarantined(space.root) == 0


@pytest.mark.parametrize("folder", [True, False])
def test_quarantine_follows_no_link(
    folder: bool, store: PosixStore, tmp_path: Path, space: Namespace, write_chain: WriteChain, path_of: PathOf
) -> None:
    """What lies there by its name may be a link that was set aside before."""
    write_chain(1)
    shard = tmp_path / "store" / space.hex / "zz"
    outside = tmp_path / "outside"
    bad = tmp_path / "store" / bad_name(f"{space.hex}/zz", BlockFault.HEADER)
    bad.parent.mkdir()
    bad.symlink_to(outside)
    if folder:
        shard.mkdir()
    else:
        shard.write_bytes(b"no folder")
    assert store._files.set_aside(shard, BlockFault.HEADER, folder=folder)
    assert bad.is_dir() if folder else bad.read_bytes() == b"no folder"
    assert not outside.exists() and [path.name for path in bad.parent.iterdir()] == [bad.name]


def interrupted(
    act: Callable[[], object], meanwhile: dict[int, Callable[[], object]], patch: pytest.MonkeyPatch
) -> int:
    """Returns how many system calls `act` makes. What is `meanwhile` happens before the calls with these numbers."""
    calls, busy = 0, False

    def before(genuine: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            nonlocal calls, busy
            if not busy:
                busy, calls = True, calls + 1
                meanwhile.get(calls - 1, lambda: None)()
                busy = False
            return genuine(*arguments, **options)

        return wrapped

    with patch.context() as within:
        for call in ("open", "mkdir", "rmdir", "unlink", "replace", "listdir", "scandir", "stat", "lstat", "fsync"):
            within.setattr(os, call, before(getattr(os, call)))
        act()
    return calls


def write_and_delete(directory: Path, writer: int, rounds: int) -> None:
    store = PosixStore(directory, durable=False)
    for number in range(rounds):
        space = tenant(number % 3)
        key = first_key(space, writer)
        store.write(space, key, space.root, PAYLOAD)
        store.read(space, key, bytearray(len(PAYLOAD)))
        assert store.delete(space.root, key)
    for number in range(3):
        space = tenant(number)
        store.write(space, first_key(space, writer), space.root, PAYLOAD)


@pytest.mark.slow
def test_writers_that_empty_each_others_namespaces(tmp_path: Path) -> None:
    """Four processes write, read and delete in three namespaces; each always finds what it has just written."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_and_delete, args=(tmp_path, n, 400)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    store = PosixStore(tmp_path)
    found = fsck(store)
    assert found.is_clean and found.sound_blocks == 12 and found.undescribed == ()
    for record in list(store.scan()):
        assert store.delete(record.root, record.key)
    assert names(tmp_path) == []


def test_abandoned_namespaces_are_leftovers(tmp_path: Path) -> None:
    """Of a writer that died before its first block, or of an older version: removed at a start and by a repair."""
    store = PosixStore(tmp_path)
    for number in range(3):
        home = tmp_path / tenant(number).hex
        (home / "ab").mkdir(parents=True)
        (home / "namespace.json").write_text("{}")
        (home / "bad").mkdir()
    kept = tmp_path / tenant(2).hex
    (kept / "bad" / "evidence.checksum").touch()
    assert fsck(store).is_clean, "a writer may be about to use them"
    for number in range(3):
        os.utime(tmp_path / tenant(number).hex, (0, 0))
    assert len(fsck(store).leftovers) == 2
    rebuild(PrefixIndex(), store, clean=True)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name] and fsck(store).is_clean


def test_what_a_process_remembers_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath.kv.stores.posix_namespaces.MAX_SETTLED", 8)
    assert MAX_SETTLED > 256, "a busy namespace is remembered as a whole"
    folders = NamespaceFolders(StoreDirectory(tmp_path), durable=False)
    for number in range(20):
        space = tenant(number)
        folders.settle(space, tmp_path / space.hex / "ab")
    assert len(folders._settled) == 8


def modes(home: Path) -> Iterator[tuple[bool, int]]:
    yield from ((path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in home.rglob("*"))


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize(
    ("mode", "files", "folders"),
    [
        (0o755, 0o600, 0o700),
        (0o777, 0o600, 0o700),
        (0o2755, 0o600, 0o700),
        (0o2770, 0o660, 0o2770),
        (None, 0o600, 0o700),
    ],
)
def test_who_may_read_a_store(
    mode: int | None, files: int, folders: int, umask: int, tmp_path: Path, payload_of: PayloadOf, space: Namespace
) -> None:
    """Its owner alone; its group where the store's directory is setgid and writable for it."""
    home = tmp_path / "kv"
    before = os.umask(umask)
    try:
        if mode is not None:
            home.mkdir()
            home.chmod(mode)
        store = PosixStore(home)
        store.prepare(space)
        for number in range(2):
            key = first_key(space, number)
            store.write(space, key, space.root, payload_of(key))
        (path,) = home.rglob(f"{key.hex()}.kv")
        with path.open("r+b") as file:
            file.write(b"wrong")
        assert store.quarantine(space.root, key) is not None
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*") if path.is_file()} == {files}
    found = {stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*") if path.is_dir()}
    assert {bits & ~stat.S_ISGID for bits in found} == {folders & ~stat.S_ISGID}
    if mode is None:
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
