"""`StoreDirectory`: paths and housekeeping of a POSIX store's files. `naming` has their names."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dualpath.kv.keys import BlockKey
from dualpath.kv.stores.block_file import (
    check_root,
    io_faults,
    open_block,
    physical_bytes,
    read_header,
)
from dualpath.kv.stores.errors import BlockError, BlockFault, StoreError, StoreLocationError
from dualpath.kv.stores.naming import (
    BAD,
    BLOCK_SUFFIX,
    DESCRIPTION,
    MAX_QUARANTINED_FILES,
    bad_name,
    block_name,
    is_namespace_name,
    is_shard_name,
    key_of,
)
from dualpath.kv.stores.protocol import BadFile, BlockRecord
from dualpath.spec.whole_file import is_draft, is_leftover


class StoreDirectory:
    """Paths and housekeeping. Methods pass OSError on unless they say otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def block_path(self, root: BlockKey, key: BlockKey) -> Path:
        return Path(f"{self.path}/{block_name(root, key)}")

    def namespace(self, root: BlockKey) -> Path:
        return self.path / root.hex()

    def examine(self, root: BlockKey, path: Path) -> BlockRecord | BadFile | None:
        """Returns the record from a block file's name and header; None if the file has vanished."""
        name = str(path.relative_to(self.path))
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

    def roots(self) -> list[BlockKey]:
        """Returns the namespaces, in order of name. Raises StoreLocationError when the store is not a directory."""
        try:
            names = [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreLocationError(f"{self.path} is not a directory; give the directory of a store") from error
        return [bytes.fromhex(name) for name in sorted(names) if is_namespace_name(name)]

    def _shards(self, root: BlockKey) -> list[Path]:
        folder = self.namespace(root)
        return [folder / name for name in _names(folder) if is_shard_name(name)]

    def block_paths(self, root: BlockKey) -> Iterator[Path]:
        for shard in self._shards(root):
            yield from (shard / name for name in _names(shard) if name.endswith(BLOCK_SUFFIX) and not is_draft(name))

    def leftovers(self, root: BlockKey) -> Iterator[Path]:
        """Yields abandoned temporary files."""
        for folder in (self.namespace(root), *self._shards(root)):
            yield from (folder / name for name in _names(folder) if is_draft(name) and is_leftover(folder / name))

    def description(self, root: BlockKey) -> bytes | None:
        path = self.namespace(root) / DESCRIPTION
        return path.read_bytes() if path.is_file() else None

    def quarantined(self, root: BlockKey) -> list[Path]:
        """Returns the quarantined files, oldest first."""
        folder, found = self.namespace(root) / BAD, []
        for name in _names(folder):
            with suppress(FileNotFoundError):
                found.append(((folder / name).stat().st_ctime_ns, folder / name))
        return [path for _, path in sorted(found)]

    def set_aside(self, path: Path, cause: BlockFault) -> bool:
        """Move a bad file into quarantine. Returns False if it is gone already."""
        aside = self.path / bad_name(str(path.relative_to(self.path)), cause)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.replace(aside)
        except FileNotFoundError:
            return False
        for surplus in self.quarantined(bytes.fromhex(aside.parent.parent.name))[:-MAX_QUARANTINED_FILES]:
            if surplus.is_dir() and not surplus.is_symlink():
                shutil.rmtree(surplus, ignore_errors=True)
            else:
                surplus.unlink(missing_ok=True)
        return True


def _names(folder: Path) -> list[str]:
    """Names in a folder; none where it is gone, or where something else has its name."""
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == errno.ELOOP:
            return []
        raise


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the with-block into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error}; check that the path exists and may be written") from error
