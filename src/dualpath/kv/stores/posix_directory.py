"""`StoreDirectory`: paths and housekeeping of a POSIX store's files. `naming` has their names.

New files and folders are for their owner alone. A store whose directory is setgid and writable for its group
(``chmod 2770``) is shared: then they are for that group, too. Nothing is ever for others.
"""

import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualpath.kv.keys import BlockKey
from dualpath.kv.stores.block_file import check_root, io_faults, open_block, physical_bytes, read_header
from dualpath.kv.stores.entries import NOT_THERE, is_folder, names, names_now, read_file, remove
from dualpath.kv.stores.errors import BlockError, BlockFault, BlockUnavailableError, StoreError, StoreLocationError
from dualpath.kv.stores.naming import (
    BAD,
    BLOCK_SUFFIX,
    DESCRIPTION,
    MAX_DESCRIPTION_BYTES,
    MAX_QUARANTINED_FILES,
    bad_name,
    block_name,
    is_namespace_name,
    is_shard_name,
    key_of,
)
from dualpath.kv.stores.protocol import BadFile, BlockRecord
from dualpath.spec.whole_file import Draft, is_draft, is_leftover

_SHARED = stat.S_ISGID | stat.S_IWGRP


class StoreDirectory:
    """Paths and housekeeping. Methods pass OSError on unless they say otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def block_path(self, root: BlockKey, key: BlockKey) -> Path:
        return Path(f"{self.path}/{block_name(root, key)}")

    def namespace(self, root: BlockKey) -> Path:
        return self.path / root.hex()

    def is_there(self) -> bool:
        """Returns True when the store's directory can be looked into now. Raises nothing."""
        with suppress(OSError):
            return is_folder(self.path)
        return False

    # ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────

    def examine(self, root: BlockKey, path: Path) -> BlockRecord | BadFile | None:
        """Returns the record from a block file's name and header; None if the file has vanished.

        Raises BlockUnavailableError.
        """
        name = self._name(path)
        key = key_of(name)
        if key is None:
            return BadFile(name, root, None, BlockFault.HEADER, "the file's name and place fit no key")
        try:
            with open_block(path, key) as fd:
                header = check_root(read_header(fd, key), root)
                with io_faults(key):
                    status = os.fstat(fd)
        except BlockError as error:
            gone = error.cause is BlockFault.MISSING
            return None if gone else BadFile(name, root, key, error.cause, error.detail)
        return BlockRecord(root, key, header.parent, header.payload_bytes, physical_bytes(status), status.st_mtime_ns)

    def everything(self) -> Iterator[BlockRecord | BadFile]:
        """Yields what lies in a block's place, and what lies in a folder's place and is none or can't be listed now.

        Raises StoreLocationError when the store is not a directory.
        """
        for name, may_be_one in self._namespaces():
            if may_be_one:
                yield from self._everything_of(bytes.fromhex(name))
            else:
                yield _no_folder(name)

    def _everything_of(self, root: BlockKey) -> Iterator[BlockRecord | BadFile]:
        folder = self.namespace(root)
        try:
            below = [folder / name for name in names(folder) if is_shard_name(name) or name == BAD]
        except OSError as error:
            yield BadFile(root.hex(), root, None, BlockFault.UNAVAILABLE, str(error))
            return
        for path in below:
            try:
                if not is_folder(path):
                    yield _no_folder(self._name(path))
                found = [] if path.name == BAD else _blocks(path)
            except OSError as error:
                yield BadFile(self._name(path), root, None, BlockFault.UNAVAILABLE, str(error))
                continue
            for block in found:
                record = self._examined(root, block)
                if record is not None:
                    yield record

    def _examined(self, root: BlockKey, path: Path) -> BlockRecord | BadFile | None:
        try:
            return self.examine(root, path)
        except BlockUnavailableError as error:
            return BadFile(self._name(path), root, error.key, BlockFault.UNAVAILABLE, error.detail)

    def roots(self) -> list[BlockKey]:
        """Returns the namespaces, in order of name. Raises StoreLocationError when the store is not a directory."""
        return [bytes.fromhex(name) for name, may_be_one in self._namespaces() if may_be_one]

    def _namespaces(self) -> list[tuple[str, bool]]:
        """Returns the entries with a namespace's name; False for one that is certainly no folder."""
        try:
            found = sorted(path.name for path in self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreLocationError(f"{self.path} is not a directory; give the directory of a store") from error
        return [(name, _may_be_folder(self.path / name)) for name in found if is_namespace_name(name)]

    def shards(self, root: BlockKey) -> list[Path]:
        """Returns the shards that can be listed now."""
        folder = self.namespace(root)
        return [folder / name for name in names_now(folder) if is_shard_name(name)]

    def leftovers(self, root: BlockKey) -> Iterator[Path]:
        """Yields abandoned temporary files, of the folders that can be listed now."""
        for folder in (self.namespace(root), *self.shards(root)):
            yield from (folder / name for name in names_now(folder) if is_draft(name) and is_leftover(folder / name))

    def description(self, root: BlockKey) -> bytes | None:
        """Returns what ``namespace.json`` holds, for as far as it may be one of ours; None if it can't be read."""
        return read_file(self.namespace(root) / DESCRIPTION, MAX_DESCRIPTION_BYTES)

    def quarantined(self, root: BlockKey) -> list[Path]:
        """Returns the quarantined files that can be listed now, oldest first."""
        folder, found = self.namespace(root) / BAD, []
        for name in names_now(folder):
            with suppress(OSError):
                found.append(((folder / name).lstat().st_ctime_ns, folder / name))
        return [path for _, path in sorted(found)]

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.path))

    # ── what is made and moved ──────────────────────────────────────────────────────────────────────────────────────

    def draft(self, final: Path) -> Draft:
        """Begin a file, which `Draft.commit` puts in place of `final`."""
        bits = self._permissions() & 0o660
        draft = Draft(final, bits)
        if bits & stat.S_IRWXG:  # whatever the umask says
            os.fchmod(draft.fd, bits)
        return draft

    def make_store(self) -> bool:
        """Make the store's own directory, for its owner alone, unless it is there. Returns False if it was."""
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except FileNotFoundError:
            self.path.mkdir(0o700, parents=True, exist_ok=True)
            return True
        return False

    def make_folder(self, path: Path) -> None:
        """Make a folder below the store unless it is there. What else is in its place is set aside."""
        bits = self._permissions()
        try:
            path.mkdir(bits)
        except FileExistsError:
            if is_folder(path):
                return
            self.set_aside(path, BlockFault.HEADER, folder=False)
            path.mkdir(bits, exist_ok=True)
        if bits & stat.S_IRWXG:
            path.chmod(bits)

    def set_aside(
        self,
        path: Path,
        cause: BlockFault,
        *,
        folder: bool | None = None,
        unless: Callable[[Path], bool] = lambda _: False,
    ) -> bool:
        """Move what is bad into quarantine, whatever it is. Returns False if it is gone already.

        Somebody may mend the place meanwhile; what is there then stays. `folder` says what the caller has found there,
        and `unless` whether what has been moved is not bad after all.
        """
        aside = self.path / bad_name(self._name(path), cause)
        try:
            if path in aside.parents:  # it lies where quarantine must be: give way first
                path = _move(path, path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), folder)
            for parent in (aside.parent.parent, aside.parent):
                self.make_folder(parent)
            moved = _move(path, aside.with_name(f".{secrets.token_hex(8)}.tmp"), folder)
            if unless(moved):
                moved.replace(path)
                return False
            remove(aside)
            moved.replace(aside)
        except _MendedError:
            return False
        except OSError as error:
            if error.errno in NOT_THERE and not os.path.lexists(path):
                return False
            raise
        with suppress(OSError):  # it is done; what can't be removed now is surplus next time
            for surplus in self.quarantined(bytes.fromhex(aside.parent.parent.name))[:-MAX_QUARANTINED_FILES]:
                remove(surplus)
        return True

    def _permissions(self) -> int:
        mode = self.path.stat().st_mode
        return 0o2770 if mode & _SHARED == _SHARED else 0o700


class _MendedError(Exception):
    """Something else lies there now than what was to be moved."""


def _move(path: Path, to: Path, folder: bool | None) -> Path:
    """Move to a name that nobody has. Raises _MendedError, OSError."""
    if folder is None:
        return path.replace(to)
    if folder:
        to.mkdir()
    else:
        os.close(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:  # the kernel puts no folder in a file's place, and no file in a folder's
        return path.replace(to)
    except OSError as error:
        remove(to)
        if isinstance(error, NotADirectoryError | IsADirectoryError):
            raise _MendedError from error
        raise


def _no_folder(name: str) -> BadFile:
    return BadFile(name, bytes.fromhex(name.split("/")[0]), None, BlockFault.HEADER, "it is not a directory")


def _may_be_folder(path: Path) -> bool:
    try:
        return is_folder(path)
    except OSError:
        return True


def _blocks(shard: Path) -> list[Path]:
    return [shard / name for name in names(shard) if name.endswith(BLOCK_SUFFIX) and not is_draft(name)]


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the with-block into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error}; check that the path exists and may be written") from error
