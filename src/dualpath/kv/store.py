"""External storage for Full Blocks: `Store`, what the runtime asks for, whatever keeps the bytes.

`PosixStore` keeps them in files of any mounted file system, `ObjectStore` as objects behind S3 or HTTP; `Storage` opens
one or the other. Both keep the same promises:

* **Nothing is visible before it is whole, checked and durable.**
* **Nothing bad is served.** `read` checks the header and every layer. It raises `BlockError` and moves nothing itself:
  whoever owns the index drops the block there, then calls `quarantine`.
* A block's key names its content, so concurrent writers of one key are harmless.

A store keeps no quota and no list of blocks. It reports what a block takes there; `PrefixIndex` counts and evicts.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from dualpath.kv.block_file import BlockFault, Pace, unpaced
from dualpath.kv.directory import BadFile, BlockRecord
from dualpath.kv.keys import KEY_BYTES, BlockKey, Namespace
from dualpath.kv.layout import KVLayout

BlockBuffer = memoryview | bytes | bytearray | NDArray[Any]
"""C-contiguous memory of exactly `KVLayout.full_block_bytes`, of whatever element type and shape."""


class StoreError(Exception):
    """A store that cannot be opened, reached or searched: where, what the system said and what to do."""


class StoreWriteError(StoreError):
    """A block that must not be published: it was not written, or is not known to be durable.

    No part of it is left under a temporary name. `__cause__` is the error behind it.
    """

    def __init__(self, key: BlockKey, where: Path | str, cause: Exception) -> None:
        super().__init__(
            f"block {key.hex()} was not written to {where}: {cause}; check the store's free space and disk"
        )
        self.key = key


class Store(Protocol):
    """Where the Full Blocks of one namespace are kept. Methods may be called from many threads at once."""

    @property
    def namespace(self) -> Namespace: ...

    def write(self, key: BlockKey, parent: BlockKey, payload: BlockBuffer, pace: Pace = unpaced) -> int:
        """Store a Full Block; returns once it is whole, checked and durable. → the bytes it takes in the store.

        A valid block of that key that is already there is left alone. `payload` must not change meanwhile. `pace` is
        called before each chunk; what it raises ends the write. Raises StoreWriteError; ValueError for a wrong size.
        """
        ...

    def read(self, key: BlockKey, into: BlockBuffer, pace: Pace = unpaced) -> None:
        """Fill `into` with a block. Raises BlockError, leaving rubbish in `into`; ValueError for a wrong size.

        Raises StoreError where no block is to blame, since the store itself does not answer.
        """
        ...

    def quarantine(self, key: BlockKey, cause: BlockFault) -> bool:
        """Set a bad block aside so that it is never served again; False if it is gone. Raises StoreError."""
        ...

    def delete(self, key: BlockKey) -> bool:
        """Remove a block and free its space; False if it is gone. Raises StoreError."""
        ...

    def scan(self, on_bad: Callable[[BadFile], None] | None = None) -> Iterator[BlockRecord]:
        """Every block whose header is sound, in the order of the keys; the others go to `on_bad`. Raises StoreError."""
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


def check_layout(space: Namespace, layout: KVLayout) -> None:
    """Raises ValueError if `space` was made for another layout than `layout`."""
    if space.layout != layout:
        raise ValueError(
            f"namespace {space.hex} was made for {space.layout}, not for {layout}; make it from the layout "
            "that the store is opened with"
        )
