"""`Store`: what the cluster needs of external storage. `open_store` finds one by its name.

A store holds Full Blocks of many namespaces. Several processes, hosts and clusters use one store at once without
knowing of each other, so every store keeps these promises:

* **Whole or not at all.** A block can be found only once it is whole and checked, and, unless the store was opened with
  ``durable=False``, once it survives a power cut.
* **Nothing bad is served.** `read` checks the header and every layer against checksums. On a fault it raises
  `BlockError` and changes nothing: the owner of the index drops the block there, then calls `quarantine`.
* **A bad day costs hits, never blocks.** Only a checksum, a wrong header or length, or "not there" speaks against a
  block. Whatever else goes wrong with one block raises `BlockUnavailableError`, and what goes wrong with the store
  another `StoreError` (`errors` tells them apart). Then nothing is deleted, set aside or called an orphan, and other
  blocks, and reads where only writes fail, go on.
* A block's key names its content, so concurrent writers of one key are harmless, and the last one wins.
* **Removal is harmless.** If blocks, or all of a live store, are removed, they are misses and can be written again.
* **What is empty is gone.** A namespace costs something from its first block until its last one is deleted, not before
  and not after: there may be millions of tenants. So does what a process remembers of one.

A store keeps no quota and no list of blocks. It reports each block's size; the coordinator's `PrefixIndex` counts and
evicts.

**Who calls what.** The coordinator has one store. Its file thread calls `prepare`, `delete` and `quarantine`, and
`scan` before it serves; its look threads call `find` while requests wait. Every engine process has one: its I/O threads
call `read` and `write`, several at once. So all methods may block, and all must be safe to call from many threads at
once. Each process opens its own store and keeps it for its whole life; nobody closes it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import msgspec
from numpy.typing import NDArray

from dualpath.kv.keys import KEY_BYTES, BlockKey, Namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.stores.block_file import Pace, unpaced
from dualpath.kv.stores.errors import BlockFault
from dualpath.spec.bounds import Name, Text

BlockBuffer = memoryview | bytes | bytearray | NDArray[Any]
"""C-contiguous memory of exactly `KVLayout.full_block_bytes`, of any element type and shape."""


class BlockRecord(msgspec.Struct, frozen=True, gc=False):
    """A stored block as its header and its file describe it."""

    root: BlockKey
    """Root key of its namespace."""
    key: BlockKey
    parent: BlockKey
    payload_bytes: int
    physical_bytes: int
    """Its size in the store."""
    mtime_ns: int
    """When it was written, by the store's clock."""


class BadFile(msgspec.Struct, frozen=True):
    """What a store has in a block's place and can't serve. `key` is None when its name is not a key.

    One whose `cause` is UNAVAILABLE can't be read now: nothing speaks against it.
    """

    path: str
    """Relative to the store."""
    root: BlockKey
    key: BlockKey | None
    cause: BlockFault
    detail: str


class NamespaceDescription(msgspec.Struct, frozen=True):
    """A store's description of a namespace, for people."""

    namespace: Name
    model_fingerprint: Name
    weights_version: Text
    layout: KVLayout
    salted: bool


class Store(Protocol):
    """Keeps Full Blocks. The module docstring says what every store promises, and who calls what."""

    @property
    def location(self) -> str:
        """Its name in messages."""
        ...

    def prepare(self, space: Namespace) -> None:
        """Get ready for blocks of `space`, and tidy up what killed writers left there. May be repeated.

        It leaves nothing behind: `write` describes a namespace. Raises StoreError when the store can't be used, not
        when it can't be changed. The coordinator calls it once at the start, for requests without a salt; an engine
        may `write` without it.
        """
        ...

    def write(
        self, space: Namespace, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced
    ) -> int:
        """Store a Full Block. Returns its size in the store once it is whole, checked and durable.

        A valid block that has the key already is left alone. `payload` must not change meanwhile. `pace` is called
        before each chunk; if it raises, the write ends. The caller writes a block after its parent. Raises
        StoreWriteError; ValueError for a wrong size or key.
        """
        ...

    def read(
        self,
        space: Namespace,
        key: BlockKey,
        into: BlockBuffer,
        pace: Pace = unpaced,
        layers: Collection[int] | None = None,
    ) -> None:
        """Fill `into` with a block. Raises BlockError, leaving `into` undefined; ValueError for a wrong size.

        Only the ranges of `layers`, in increasing order, are needed (None: all), at their places; what `into` has of
        others afterwards is undefined. A store may read more of the block, and `pace` counts what it reads.

        `BlockFault.MISSING` means that the block is gone. BlockUnavailableError means that it can't be read now,
        another StoreError that the store does not answer: then no block is to blame.
        """
        ...

    def find(self, root: BlockKey, keys: Sequence[BlockKey]) -> list[BlockRecord]:
        """Returns records of the blocks of `keys` up to the first that is missing, has a bad header or can't be read.

        A request waits for this, and mostly `keys[0]` is missing: that case must cost one look. Raises StoreError;
        BlockUnavailableError when `keys[0]` can't be read now: who asks whether a block is there must not take that
        for a no.
        """
        ...

    def delete(self, root: BlockKey, key: BlockKey) -> bool:
        """Remove a block and free its space; the last one takes its namespace with it. Returns False if it is gone.

        Raises StoreError.
        """
        ...

    def quarantine(self, root: BlockKey, key: BlockKey) -> BlockFault | None:
        """Check every byte of a block again, and quarantine it if it is bad, so that it is never served again.

        Returns its fault; None if it is gone, or sound because it was written again. Raises StoreError, and changes
        nothing, when it can't be checked now.
        """
        ...

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """Yields every block of every namespace with a sound header; what else is there goes to `on_bad`.

        What can't be read or listed now goes there, too, as `BlockFault.UNAVAILABLE`. Blocks written or deleted
        meanwhile may or may not be seen. Raises StoreError when the store can't be listed at all.
        """
        ...


@runtime_checkable
class Inspectable(Store, Protocol):
    """A store that `dualpath store` can inspect; optional for a store. All methods may raise StoreError."""

    def descriptions(self) -> dict[BlockKey, NamespaceDescription | None]:
        """Returns the namespaces by root key; None for a description that is missing, damaged or can't be read."""
        ...

    def verify(self, root: BlockKey, key: BlockKey) -> None:
        """Check every byte of a block. Raises BlockError, BlockUnavailableError."""
        ...

    def set_aside(self, file: BadFile) -> None:
        """Quarantine a file whose name is not a key; nothing happens if it is gone."""
        ...

    def quarantined(self, root: BlockKey) -> int:
        """Returns how many bad blocks a namespace keeps for inspection."""
        ...

    def leftovers(self, *, remove: bool = False) -> list[str]:
        """Returns abandoned half-written files and namespaces without blocks; `remove` deletes them."""
        ...


def bytes_of_block(buffer: BlockBuffer, layout: KVLayout) -> memoryview:
    """Returns `buffer` as plain bytes. Raises ValueError when it is not exactly one Full Block."""
    view = memoryview(cast(Any, buffer))
    if not view.c_contiguous or view.nbytes != layout.full_block_bytes:
        raise ValueError(
            f"a Full Block of this store is {layout.full_block_bytes} contiguous bytes; got {view.nbytes}"
            f"{'' if view.c_contiguous else ' that are not contiguous'}"
        )
    return view.cast("B")


def room_for_block(buffer: BlockBuffer, layout: KVLayout) -> memoryview:
    """`bytes_of_block` for memory to read into. Raises ValueError also when it is read-only."""
    view = bytes_of_block(buffer, layout)
    if view.readonly:
        raise ValueError("a block can only be read into writable memory")
    return view


def check_keys(key: BlockKey, parent: BlockKey) -> None:
    """Raises ValueError when one of them does not have the length of a key."""
    if len(key) != KEY_BYTES or len(parent) != KEY_BYTES:
        raise ValueError(f"keys have {KEY_BYTES} bytes; got key {key!r} and parent {parent!r}")
