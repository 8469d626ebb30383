"""Errors of the system, for a while: what can't be read now is a miss, and nothing is deleted or set aside for it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualpath.kv import (
    BlockKey,
    BlockUnavailableError,
    Namespace,
    PosixStore,
    PrefixIndex,
    StoreError,
    StoreWriteError,
    block_keys,
    delete_orphan,
    rebuild,
)
from dualpath.kv.stores.inspection import fsck, stat

PathOf = Callable[[BlockKey], Path]
PayloadOf = Callable[[BlockKey], np.ndarray]
WriteChain = Callable[..., list[BlockKey]]

ERRORS = [
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT),
    *(errno.EBUSY, errno.EINTR, errno.ENOTCONN, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.EROFS),
]
CALLS = ["open", "pread", "preadv", "fstat"]


class Failing:
    """System calls of `os` that touch a path, or any, fail with a code while `on` is True."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: list[str], code: int, path: str = "") -> None:
        self.on = True
        self._files: set[int] = set()
        for call in calls:
            patch.setattr(os, call, self._wrapped(call, getattr(os, call), code, path))
        if "open" not in calls:
            patch.setattr(os, "open", self._noting(os.open, path))

    def _wrapped(self, call: str, genuine: Callable[..., object], code: int, path: str) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            mine = path in str(arguments[0]) if call == "open" else arguments[0] in self._files
            if self.on and mine:
                raise OSError(code, os.strerror(code))
            return genuine(*arguments, **options)

        return wrapped

    def _noting(self, genuine: Callable[..., int], path: str) -> Callable[..., int]:
        def wrapped(*arguments: object, **options: object) -> int:
            fd = genuine(*arguments, **options)
            (self._files.add if path in str(arguments[0]) else self._files.discard)(fd)
            return fd

        return wrapped


def everything(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_one_block_that_can_not_be_read(
    code: int,
    call: str,
    store: PosixStore,
    space: Namespace,
    tmp_path: Path,
    write_chain: WriteChain,
    payload_of: PayloadOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = write_chain(4)
    before = everything(tmp_path / "store")
    into = bytearray(768)
    with monkeypatch.context() as patch:
        Failing(patch, [call], code, keys[1].hex())
        if call != "preadv":
            with pytest.raises(BlockUnavailableError, match=keys[1].hex()):
                store.find(space.root, keys[1:])
            assert [record.key for record in store.find(space.root, keys)] == keys[:1]
            with pytest.raises(BlockUnavailableError):
                delete_orphan(store, space.root, keys[1], keys[2])
            report = rebuild(PrefixIndex(), store, clean=True)
            assert (report.published_blocks, report.orphans, report.bad) == (1, (), ())
            assert [file.key for file in report.unavailable] == [keys[1]]
        for touch in (
            lambda: store.read(space, keys[1], into),
            lambda: store.verify(space.root, keys[1]),
            lambda: store.quarantine(space.root, keys[1]),
        ):
            with pytest.raises(BlockUnavailableError, match=keys[1].hex()) as caught:
                touch()
            assert caught.value.key == keys[1]
        found = fsck(store, repair=True)
        assert [file.key for file in found.unavailable] == [keys[1]]
        assert (found.bad_files, found.orphans, found.leftovers) == ((), (), ()) and not found.is_repaired
        store.read(space, keys[2], into)
    assert everything(tmp_path / "store") == before, "nothing was deleted, nothing set aside"
    assert rebuild(PrefixIndex(), store, clean=True).published_blocks == 4
    for key in keys:
        store.read(space, key, into)
        assert into == payload_of(key).tobytes()


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_no_file_can_be_opened(
    code: int,
    store: PosixStore,
    space: Namespace,
    tmp_path: Path,
    write_chain: WriteChain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A start then indexes nothing, and finds everything later; a repair repairs nothing."""
    keys = write_chain(4)
    before = everything(tmp_path / "store")
    with monkeypatch.context() as patch:
        Failing(patch, ["open"], code, str(tmp_path))
        for key in keys:
            with pytest.raises(BlockUnavailableError):
                store.read(space, key, bytearray(768))
        report = rebuild(PrefixIndex(), store, clean=True)
        assert (report.published_blocks, report.orphans, report.bad, len(report.unavailable)) == (0, (), (), 4)
        assert len(fsck(store, repair=True).unavailable) == 4
        assert stat(store).blocks == 0
        with pytest.raises(StoreWriteError):
            store.write(space, keys[0], space.root, bytes(768))
    assert everything(tmp_path / "store") == before
    index = PrefixIndex()
    rebuild(index, store)
    assert index.match(keys) == 4


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("place", ["shard", "namespace"])
def test_a_folder_that_can_not_be_listed(
    code: int,
    place: str,
    store: PosixStore,
    space: Namespace,
    tmp_path: Path,
    write_chain: WriteChain,
    path_of: PathOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Children of blocks that can't be listed are no orphans: those parents are found when looked for."""
    keys = write_chain(4)
    folder = path_of(keys[1]).parent if place == "shard" else path_of(keys[1]).parents[1]
    genuine, before = Path.iterdir, everything(tmp_path / "store")

    def iterdir(path: Path) -> object:
        if path == folder:
            raise OSError(code, os.strerror(code))
        return genuine(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir)
        report = rebuild(PrefixIndex(), store, clean=True)
        assert (report.orphans, report.bad, len(report.unavailable)) == ((), (), 1)
        assert report.published_blocks == (4 if place == "shard" else 0)
        found = fsck(store, repair=True)
        assert len(found.unavailable) == 1 and not found.is_repaired and found.orphans == ()
        store.read(space, keys[1], bytearray(768))
    assert everything(tmp_path / "store") == before


@pytest.mark.parametrize(
    "code", [errno.EROFS, errno.EACCES, errno.EIO, errno.ENOSPC, errno.EPERM], ids=errno.errorcode.get
)
def test_a_store_that_can_not_be_changed_serves_what_it_has(
    code: int,
    store: PosixStore,
    space: Namespace,
    tmp_path: Path,
    write_chain: WriteChain,
    path_of: PathOf,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a bad block, its orphan, an old draft and a damaged description: cleaning them fails, and is noted."""
    sound, broken = write_chain(3), write_chain(3, 1000)
    path_of(broken[1]).write_bytes(b"half")
    draft = path_of(sound[0]).with_name(".x.kv.00000000.1.abcd.tmp")
    draft.touch()
    os.utime(draft, (0, 0))
    (tmp_path / "store" / space.hex / "namespace.json").write_bytes(b"{")
    before = everything(tmp_path / "store")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        for call in ("unlink", "rename", "replace", "rmdir", "write"):
            patch.setattr(os, call, refuse)
        for call in ("mkdir", "open"):
            patch.setattr(os, call, _refusing_new(getattr(os, call), refuse))
        again = PosixStore(tmp_path / "store")
        again.prepare(space)
        index = PrefixIndex()
        report = rebuild(index, again, clean=True)
        assert (report.published_blocks, report.not_cleaned) == (4, 3)
        assert index.match(sound) == 3
        assert "stay in the store" in caplog.text and "cannot be tidied" in caplog.text
        again.read(space, sound[0], bytearray(768))
        found = fsck(again, repair=True)
        assert len(found.not_repaired) == 3 and not found.is_repaired
        with pytest.raises(StoreError):
            again.delete(space.root, sound[2])
        with pytest.raises(StoreWriteError):
            again.write(space, broken[1], broken[0], bytes(768))
    assert everything(tmp_path / "store") == before
    assert fsck(store, repair=True).is_repaired


def _refusing_new(genuine: Callable[..., object], refuse: Callable[[], None]) -> Callable[..., object]:
    """Opening or making what is there does what it always does."""

    def wrapped(path: Path, *arguments: object, **_: object) -> object:
        return genuine(path, *arguments) if os.path.lexists(path) else refuse()

    return wrapped


def test_a_block_that_can_not_be_read_is_written_anew(
    store: PosixStore, space: Namespace, write_chain: WriteChain, payload_of: PayloadOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worn sector heals so; the file that took its place opens."""
    (key,) = write_chain(1)
    with monkeypatch.context() as patch:
        failing = Failing(patch, ["open"], errno.EIO, f"/{key.hex()}.kv")
        store.write(space, key, space.root, payload_of(key))
        failing.on = False
        store.read(space, key, bytearray(768))


def test_the_store_as_a_whole(store: PosixStore, space: Namespace, tmp_path: Path, write_chain: WriteChain) -> None:
    """Whose directory is not there says nothing about any block."""
    (key,) = write_chain(1)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="there is no such directory") as caught:
        store.read(space, key, bytearray(768))
    assert not isinstance(caught.value, BlockUnavailableError)
    assert block_keys(space.root, range(16), 16) == [key]
