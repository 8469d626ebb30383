"""`Store`: what the cluster asks of external storage, whatever keeps the bytes. `open_store` finds one by its name.

A store holds Full Blocks of many namespaces. Several processes, hosts and clusters use one at once and know nothing of
each other, so every store keeps these promises:

* **Whole or not at all.** A block can be found only once it is whole and checked, and, unless the store was opened with
  ``durable=False``, once it survives a power cut.
* **Nothing bad is served.** `read` holds the header and every layer against checksums. It raises `BlockError` and
  changes nothing: whoever owns the index drops the block there, then calls `quarantine`.
* A block's key names its content, so concurrent writers of one key are harmless, and the last one wins.
* **Nobody's work is lost.** What was removed under a live store (blocks, or all of it) is a miss, and can be written
  again.

A store keeps no quota and no list of blocks. It reports what a block takes; the coordinator's `PrefixIndex` counts and
evicts.

**Who calls what.** The coordinator has one store: `prepare`, `delete` and `quarantine` come from its file thread, and
`scan` does before it serves; `find` comes from its look-out threads while requests wait. Every engine process has one:
`read` and `write` come from its I/O threads, several at once. So all methods may block, and all must be safe to call
from many threads at once. Each process opens its own and keeps it as long as it lives; nobody closes it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import msgspec
from numpy.typing import NDArray

from dualpath.kv.keys import KEY_BYTES, BlockKey, Namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.stores.block_file import BlockFault, Pace, unpaced

BlockBuffer = memoryview | bytes | bytearray | NDArray[Any]
"""C-contiguous memory of exactly `KVLayout.full_block_bytes`, of whatever element type and shape."""


class StoreError(Exception):
    """A store that cannot be opened, reached or searched: where, what the system said and what to do."""


class StoreLocationError(StoreError):
    """What ``--store`` names can't be a store: an unknown kind, a bad URL, no such directory, a package not there."""


class StoreWriteError(StoreError):
    """A block that must not be published: it was not written, or is not known to be durable.

    No part of it is left under a temporary name. `__cause__` is the error behind it.
    """

    def __init__(self, key: BlockKey, where: Path | str, cause: Exception) -> None:
        super().__init__(
            f"block {key.hex()} was not written to {where}: {cause}; check the store's free space and disk"
        )
        self.key = key


class BlockRecord(msgspec.Struct, frozen=True, gc=False):
    """A stored block as its header and its file tell."""

    root: BlockKey
    """Root key of its namespace."""
    key: BlockKey
    parent: BlockKey
    payload_bytes: int
    physical_bytes: int
    """What it takes in the store."""
    mtime_ns: int
    """When it was written, by the store's clock."""


class BadFile(msgspec.Struct, frozen=True):
    """A file in a store that holds no servable block. `key` is None where its name is no key."""

    path: str
    """Below the store."""
    root: BlockKey
    key: BlockKey | None
    cause: BlockFault
    detail: str


class NamespaceDescription(msgspec.Struct, frozen=True):
    """What a store says of a namespace, for people."""

    namespace: str
    model_fingerprint: str
    weights_version: str
    layout: KVLayout
    salted: bool


class Store(Protocol):
    """Where Full Blocks are kept; the module's docstring says what every store promises, and who calls what."""

    @property
    def location(self) -> str:
        """What people call it in messages."""
        ...

    def prepare(self, space: Namespace) -> None:
        """Make ready for blocks of `space`, and describe it. Again is harmless. Raises StoreError.

        It is called before the first request of a tenant is matched; an engine may `write` without it.
        """
        ...

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        """Store a Full Block; returns once it is whole, checked and durable. → the bytes it takes in the store.

        A valid block of that key that is already there is left alone. `payload` must not change meanwhile. `pace` is
        called before each chunk; what it raises ends the write. The caller writes a block after its parent. Raises
        StoreWriteError; ValueError for a wrong size or key.
        """
        ...

    def read(self, space: Namespace, key: BlockKey, into: BlockBuffer, pace: Pace = unpaced) -> None:
        """Fill `into` with a block. Raises BlockError, leaving rubbish in `into`; ValueError for a wrong size.

        `BlockFault.MISSING` is for a block that is gone. StoreError is for a store that does not answer: no block is to
        blame, and none is dropped.
        """
        ...

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        """Records of the blocks at the start of `keys` that are there, up to the first that is not or has a bad header.

        A request waits meanwhile, and mostly `keys[0]` is not there: that must cost one look. Raises StoreError.
        """
        ...

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        """Remove a block and free its space; False if it is gone. Raises StoreError."""
        ...

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        """Check a block again, every byte, and set it aside if it is bad, so that it is never served again.

        → what is wrong with it; None if it is gone, or sound because somebody has written it anew. Raises StoreError.
        """
        ...

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """Every block of every namespace whose header is sound; the others go to `on_bad`. Raises StoreError.

        Blocks written or deleted meanwhile may or may not be seen.
        """
        ...


@runtime_checkable
class Inspectable(Store, Protocol):
    """A store that `dualpath store` can look into; a store need not be one. All methods may raise StoreError."""

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        """The namespaces by root key; None where the description is missing or damaged."""
        ...

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        """Check every byte of a block. Raises BlockError."""
        ...

    def set_aside(self, file: BadFile) -> None:
        """Put a file where it is not found again; nothing happens if it is gone. For files whose name is no key."""
        ...

    def quarantined(self, root: BlockKey) -> int:
        """How many bad blocks a namespace keeps for inspection."""
        ...

    def leftovers(self, *, remove: bool = False) -> list[str]:
        """Half-written files that nobody writes any more."""
        ...


def bytes_of_block(buffer: BlockBuffer, layout: KVLayout) -> memoryview:
    """`buffer` as plain bytes. Raises ValueError where it is not exactly one Full Block."""
    view = memoryview(cast(Any, buffer))
    if not view.c_contiguous or view.nbytes != layout.full_block_bytes:
        raise ValueError(
            f"a Full Block of this store is {layout.full_block_bytes} contiguous bytes; got {view.nbytes}"
            f"{'' if view.c_contiguous else ' that are not contiguous'}"
        )
    return view.cast("B")


def room_for_block(buffer: BlockBuffer, layout: KVLayout) -> memoryview:
    """`bytes_of_block` of memory to read into. Raises ValueError."""
    view = bytes_of_block(buffer, layout)
    if view.readonly:
        raise ValueError("a block can only be read into writable memory")
    return view


def check_keys(key: BlockKey, parent: BlockKey) -> None:
    """Raises ValueError for what is no key."""
    if len(key) != KEY_BYTES or len(parent) != KEY_BYTES:
        raise ValueError(f"keys have {KEY_BYTES} bytes; got key {key!r} and parent {parent!r}")
