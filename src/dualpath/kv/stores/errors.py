"""What may go wrong with a store. The question is always: whom does an error speak against?

* `BlockError`: this block is **bad or gone**. Only a checksum, a wrong header, a wrong length or "not there" says so.
  The block leaves the index, and its file may be set aside.
* `BlockUnavailableError`: this block **can't be read now**: an I/O error, too many open files, no permission, an object
  that its server refuses. Nothing speaks against the block or any other; nothing may be deleted or set aside for it.
* any other `StoreError`: **the store** can't be used now, so no block of it is worth a try.
"""

import os
from enum import Enum

from dualpath.kv.keys import BlockKey


class BlockFault(Enum):
    """What is wrong with a stored block. The value is what metrics and reports show."""

    MISSING = "missing"
    TRUNCATED = "truncated"
    CHECKSUM = "checksum"
    HEADER = "header"
    """It is not a block file, has another key, namespace or layout, or has a damaged header."""
    UNAVAILABLE = "unavailable"
    """It can't be read now (`BlockUnavailableError`): never the cause of a `BlockError`, only in reports."""


class BlockError(Exception):
    """A stored block that is bad or gone: treat it as a miss. `cause` says why."""

    def __init__(self, key: BlockKey, cause: BlockFault, detail: str) -> None:
        super().__init__(f"block {key.hex()}: {cause.value}: {detail}")
        self.key = key
        self.cause = cause
        self.detail = detail


class StoreError(Exception):
    """A store cannot be opened, reached or searched; the message says where, the system's error and what to do."""


class BlockUnavailableError(StoreError):
    """One block can't be read now, for a reason that says nothing about its bytes, nor about other blocks.

    Treat it as a miss, and count it. It must not be quarantined, nor must anything be deleted that builds on it.
    """

    def __init__(self, key: BlockKey, detail: str) -> None:
        super().__init__(f"block {key.hex()} can't be read now: {detail}")
        self.key = key
        self.detail = detail


class StoreLocationError(StoreError):
    """``--store`` does not name a store: an unknown kind, a bad URL, no such directory, or a missing package."""


class StoreWriteError(StoreError):
    """A block was not written or is not known to be durable, so it must not be published. Reads are not affected.

    No part of it is left under a temporary name. `__cause__` is the original error.
    """

    def __init__(self, key: BlockKey, where: os.PathLike[str] | str, cause: Exception) -> None:
        super().__init__(
            f"block {key.hex()} was not written to {where}: {cause}; check the store's free space and disk"
        )
        self.key = key
