"""Whatever lies in a file's or a folder's place is a fault of that place: nothing hangs or ends, all else goes on."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from dualpath.kv import BlockError, BlockFault, BlockKey, Namespace, PosixStore, PrefixIndex, rebuild
from dualpath.kv.stores.block_file import PAGE_BYTES
from dualpath.kv.stores.inspection import fsck, stat

pytestmark = pytest.mark.timeout(60)

PathOf = Callable[[BlockKey], Path]
PayloadOf = Callable[[BlockKey], np.ndarray]
WriteChain = Callable[..., list[BlockKey]]
Make = Callable[[Path], object]


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "somebody's").write_text("file")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has 107 bytes at most
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def file(path: Path) -> None:
    path.write_bytes(b"somebody's")


OBSTACLES = [os.mkfifo, full_folder, unix_socket, loop, dangling, device, file]


def read_all(store: PosixStore, space: Namespace, keys: list[BlockKey], payload_of: PayloadOf) -> None:
    for key in keys:
        into = bytearray(768)
        store.read(space, key, into)
        assert into == payload_of(key).tobytes()


@pytest.fixture
def chains(write_chain: WriteChain) -> list[list[BlockKey]]:
    return [write_chain(3), write_chain(3, 1000)]


@pytest.mark.parametrize("make", OBSTACLES)
@pytest.mark.parametrize("place", ["block", "shard", "namespace", "bad", "in bad", "description", "draft"])
def test_an_obstacle(
    make: Make,
    place: str,
    store: PosixStore,
    space: Namespace,
    tmp_path: Path,
    chains: list[list[BlockKey]],
    path_of: PathOf,
    payload_of: PayloadOf,
    write_chain: WriteChain,
) -> None:
    (broken, sound), home = chains, tmp_path / "store" / space.hex
    block = path_of(broken[1])
    where = {
        "block": block,
        "shard": block.parent,
        "namespace": home,
        "bad": home / "bad",
        "in bad": home / "bad" / f"{broken[1].hex()}.header",
        "description": home / "namespace.json",
        "draft": block.with_name(".x.kv.00000000.1.abcd.tmp"),
    }[place]
    where.parent.mkdir(exist_ok=True)
    if where.exists():
        where.rename(tmp_path / "aside")
    make(where)
    if place == "draft":
        os.utime(where, (0, 0), follow_symlinks=False)
    is_one = (make is full_folder and place in ("shard", "namespace", "bad")) or (make is file and place == "block")

    again = PosixStore(tmp_path / "store")
    report = fsck(again)
    stat(again)
    rebuild(PrefixIndex(), again)
    again.prepare(space)
    name = str(where.relative_to(tmp_path / "store"))
    if place in ("block", "shard", "namespace", "bad") and not is_one:
        assert [(bad.path, bad.cause) for bad in report.bad_files] == [(name, BlockFault.HEADER)]
    if place == "description":
        assert report.undescribed == (space.hex,)
    if place == "block":
        with pytest.raises(BlockError):
            again.read(space, broken[1], bytearray(768))
    if place not in ("namespace", "shard"):
        read_all(again, space, sound, payload_of)

    assert (write_chain(3), write_chain(3, 1000)) == (broken, sound), "everything can be written"
    read_all(again, space, [*broken, *sound], payload_of)
    with path_of(broken[1]).open("r+b") as damaged:
        damaged.seek(PAGE_BYTES)
        damaged.write(b"wrong")
    assert again.quarantine(space.root, broken[1]) is BlockFault.CHECKSUM, "and set aside"
    with path_of(broken[2]).open("r+b") as damaged:
        damaged.write(b"wrong")
    assert fsck(again, repair=True).is_repaired
    assert fsck(again).is_clean
    read_all(again, space, [broken[0], *sound], payload_of)


@pytest.mark.parametrize("make", OBSTACLES)
def test_a_start_sets_aside_what_is_in_a_blocks_place(
    make: Make, store: PosixStore, tmp_path: Path, space: Namespace, chains: list[list[BlockKey]], path_of: PathOf
) -> None:
    """Also beside an entry of that name in quarantine, which is a directory."""
    broken, sound = chains
    full_folder_of = tmp_path / "store" / space.hex / "bad"
    full_folder_of.mkdir()
    full_folder(full_folder_of / f"{broken[1].hex()}.header")
    path_of(broken[1]).unlink()
    make(path_of(broken[1]))
    assert store.quarantine(space.root, sound[0]) is None
    index = PrefixIndex()
    report = rebuild(index, store, clean=True)
    assert (report.published_blocks, report.orphans, report.not_cleaned) == (4, (broken[2],), 0)
    assert fsck(store).is_clean


@pytest.mark.parametrize(
    "content",
    [
        b'{"namespace": "\xff"}',
        b"[" * (1 << 20),
        b"",
        b"null",
        b'{"namespace": 1}',
        b"{" + b" " * (1 << 24),
        b'{"namespace": "%s", "model_fingerprint": "", "weights_version": "", "salted": false, "layout": {}}',
    ],
)
def test_a_description_that_is_none(
    content: bytes, store: PosixStore, space: Namespace, tmp_path: Path, write_chain: WriteChain
) -> None:
    """A flipped bit, or a huge file: an undescribed namespace, no more. The next block brings it again."""
    keys = write_chain(2)
    path = tmp_path / "store" / space.hex / "namespace.json"
    path.write_bytes(content.replace(b"%s", space.hex.encode()))
    if len(content) > 1 << 23:
        os.truncate(path, 1 << 40)  # a terabyte, if somebody read it all
    assert store.descriptions() == {space.root: None}
    report = fsck(store, repair=True)
    assert (report.undescribed, report.sound_blocks) == ((space.hex,), 2)
    assert stat(store).namespaces[0].blocks == 2
    assert rebuild(PrefixIndex(), store, clean=True).published_blocks == 2
    write_chain(1, 1000, keys[-1])
    assert fsck(store).is_clean


def test_names_that_no_terminal_takes(
    store: PosixStore, path_of: PathOf, tmp_path: Path, write_chain: WriteChain
) -> None:
    (key,) = write_chain(1)
    for name in (b"\xff\x1b[2J.kv", b"n" * 252 + b".kv"):
        Path(os.fsdecode(os.fsencode(path_of(key).parent) + b"/" + name)).touch()
    report = fsck(store, repair=True)
    assert len(report.bad_files) == 2 and report.is_repaired
    assert all(file.path.isascii() and file.path.isprintable() for file in report.bad_files)
    assert msgspec.json.encode(report)
    assert fsck(store).is_clean


def test_the_command_says_what_it_found(
    tmp_path: Path, store: PosixStore, path_of: PathOf, write_chain: WriteChain
) -> None:
    """A FIFO in a block's place: nobody waits for a writer."""
    keys = write_chain(3)
    path_of(keys[1]).unlink()
    os.mkfifo(path_of(keys[1]))
    for action, code, said in (
        ("stat", 0, "0"),
        ("fsck", 1, "is not a regular file"),
        ("fsck --repair", 0, "repaired"),
        ("fsck", 0, "sound"),
    ):
        command = [sys.executable, "-m", "dualpath", "store", *action.split(), str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert (done.returncode, done.stderr) == (code, "") and said in done.stdout
