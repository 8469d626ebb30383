"""The directory of one namespace in a POSIX store: where its files lie and what else may lie there.

::

    <store>/<namespace hex>/namespace.json          model and layout, for people and for `dualpath store`
                            ab/ab…cd.kv             one file per Full Block, 256 shards by the key's first byte
                            ab/.ab…cd.kv.….tmp      a block being written, or a leftover of a killed process
                            bad/ab…cd.checksum      quarantined files, never served again
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from dualpath.kv.block_file import BlockError, BlockFault, BlockHeader, io_faults, open_block, physical_bytes
from dualpath.kv.draft import is_draft, is_leftover, write_file
from dualpath.kv.keys import KEY_BYTES, BlockKey, Namespace
from dualpath.kv.layout import KVLayout

MAX_QUARANTINED_FILES = 64
"""A namespace keeps this many bad files for inspection; quarantining one more deletes the oldest."""
DESCRIPTION = "namespace.json"
BLOCK_SUFFIX = ".kv"
BAD = "bad"


class BlockRecord(msgspec.Struct, frozen=True, gc=False):
    """A stored block as its header and its file tell."""

    key: BlockKey
    parent: BlockKey
    payload_bytes: int
    physical_bytes: int
    mtime_ns: int


class BadFile(msgspec.Struct, frozen=True):
    """A file in a store that holds no servable block. `key` is None where its name is no key."""

    path: str
    key: BlockKey | None
    cause: BlockFault
    detail: str


class NamespaceDescription(msgspec.Struct, frozen=True):
    """The content of ``namespace.json``."""

    namespace: str
    model_fingerprint: str
    weights_version: str
    layout: KVLayout
    salted: bool


class NamespaceDirectory:
    """Paths and housekeeping of one namespace's directory. Methods raise OSError as it comes, unless they say else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bad = path / BAD

    def block_path(self, key: BlockKey) -> Path:
        return Path(f"{self.path}/{block_name(key)}")

    def block_paths(self) -> Iterator[Path]:
        """All block files, in the order of their names. Files that vanish meanwhile may be among them."""
        for shard in self._shards():
            yield from (shard / name for name in _names(shard) if name.endswith(BLOCK_SUFFIX) and not is_draft(name))

    def drafts(self) -> Iterator[Path]:
        """All temporary files, in use or left over."""
        for folder in (self.path, *self._shards()):
            yield from (folder / name for name in _names(folder) if is_draft(name))

    def remove_leftovers(self) -> int:
        """Delete temporary files that nobody writes any more; how many there were."""
        removed = 0
        for path in filter(is_leftover, self.drafts()):
            path.unlink(missing_ok=True)
            removed += 1
        return removed

    def quarantined(self) -> list[Path]:
        """Bad files set aside, oldest first."""
        found = []
        for name in _names(self._bad):
            with suppress(FileNotFoundError):
                found.append(((self._bad / name).stat().st_ctime_ns, self._bad / name))
        return [path for _, path in sorted(found)]

    def set_aside(self, path: Path, cause: BlockFault) -> bool:
        """Move a bad file into quarantine; False if it is gone already."""
        self._bad.mkdir(exist_ok=True)
        try:
            path.replace(self._bad / f"{path.name.removesuffix(BLOCK_SUFFIX)}.{cause.value}")
        except FileNotFoundError:
            return False
        for surplus in self.quarantined()[:-MAX_QUARANTINED_FILES]:
            surplus.unlink(missing_ok=True)
        return True

    def describe(self, namespace: Namespace) -> None:
        """Make ``namespace.json`` say what `namespace` is."""
        text = describe(namespace)
        path = self.path / DESCRIPTION
        if not path.exists() or path.read_bytes() != text:
            write_file(path, text)

    def description(self) -> NamespaceDescription | None:
        """What ``namespace.json`` says; None if it is missing, damaged or another namespace's."""
        try:
            text = (self.path / DESCRIPTION).read_bytes()
        except FileNotFoundError:
            return None
        return described(text, self.path.name)

    def _shards(self) -> list[Path]:
        return [self.path / name for name in _names(self.path) if is_shard_name(name)]


def namespace_directories(store: Path) -> list[NamespaceDirectory]:
    """The namespaces of a store, in the order of their names. Raises OSError if `store` is no readable directory."""
    names = sorted(entry.name for entry in os.scandir(store) if entry.is_dir())
    return [NamespaceDirectory(store / name) for name in names if is_namespace_name(name)]


def is_namespace_name(name: str) -> bool:
    """Whether a directory, or what stands for one in a bucket, may be a namespace."""
    return len(name) == 2 * KEY_BYTES and _is_hex(name)


def stored_namespaces(store: Path | str, layout: KVLayout) -> list[Namespace]:
    """The described namespaces of a store that have this layout, in the order of their names; [] for no directory.

    With them a restart can count all that a store holds, blocks of tenants who have not come back included.
    Raises OSError if `store` cannot be listed.
    """
    if not Path(store).exists():
        return []
    return namespaces_of((space.description() for space in namespace_directories(Path(store))), layout)


def describe(space: Namespace) -> bytes:
    """What ``namespace.json`` says of a namespace."""
    description = NamespaceDescription(
        space.hex, space.model_fingerprint, space.weights_version, space.layout, space.salted
    )
    return msgspec.json.format(msgspec.json.encode(description)) + b"\n"


def described(text: bytes, name: str) -> NamespaceDescription | None:
    """What `describe` said of the namespace called `name`; None if `text` is damaged or another's."""
    try:
        found = msgspec.json.decode(text, type=NamespaceDescription)
    except msgspec.DecodeError:
        return None
    return found if found.namespace == name else None


def namespaces_of(found: Iterable[NamespaceDescription | None], layout: KVLayout) -> list[Namespace]:
    """The described namespaces that have this layout."""
    return [
        Namespace(bytes.fromhex(one.namespace), one.model_fingerprint, one.weights_version, one.layout, one.salted)
        for one in found
        if one is not None and one.layout == layout
    ]


def block_name(key: BlockKey) -> str:
    """Where a block lies in its namespace, with ``/`` between the parts."""
    name = key.hex()
    return f"{name[:2]}/{name}{BLOCK_SUFFIX}"


def key_of(path: Path) -> BlockKey | None:
    """The key a block file's name stands for; None if the name is no key or the file lies in the wrong shard."""
    name = path.name.removesuffix(BLOCK_SUFFIX)
    if not is_namespace_name(name) or path.parent.name != name[:2]:
        return None
    return bytes.fromhex(name)


def scan_file(path: Path, header_of: Callable[[int, BlockKey], BlockHeader]) -> BlockRecord | BadFile | None:
    """What a block file's name and header tell; None if the file has vanished."""
    key = key_of(path)
    if key is None:
        return BadFile(str(path), None, BlockFault.HEADER, "the file's name and place fit no key")
    try:
        with open_block(path, key) as fd:
            header = header_of(fd, key)
            with io_faults(key):
                status = os.fstat(fd)
    except BlockError as error:
        return None if error.cause is BlockFault.MISSING else BadFile(str(path), key, error.cause, error.detail)
    return BlockRecord(key, header.parent, header.payload_bytes, physical_bytes(status), status.st_mtime_ns)


def is_shard_name(name: str) -> bool:
    """Whether block files may lie there: two hexadecimal digits."""
    return len(name) == 2 and _is_hex(name)


def _is_hex(text: str) -> bool:
    return set(text) <= set("0123456789abcdef")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return []
