"""`ObjectNamespaces`: a namespace has a description from its first block until its last one has gone.

To know that a deleted block was the last takes a list, so a process remembers one block of each namespace that it knows
to be there, and lists only when that one is deleted.
"""

import time
from collections.abc import Iterator
from contextlib import suppress

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.bucket import Bucket, ObjectError, ObjectRecord
from dualpath.kv.stores.errors import BlockFault
from dualpath.kv.stores.naming import (
    BAD,
    BLOCK_SUFFIX,
    DESCRIPTION,
    MAX_DESCRIPTION_BYTES,
    describe,
    is_namespace_name,
    is_shard_name,
    key_of,
)
from dualpath.kv.stores.protocol import BadFile
from dualpath.kv.stores.remembered import remember
from dualpath.spec.whole_file import LEFTOVER_AGE_S

DESCRIBE_S = 60.0
"""After this long the next write describes its namespace again: the bucket may have been emptied."""
MAX_REMEMBERED = 1 << 16
"""Most namespaces of which something is remembered."""


class ObjectNamespaces:
    """The namespaces of a bucket. Methods raise StoreError unless they say otherwise."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._described_s: dict[BlockKey, float] = {}
        self._known_block: dict[BlockKey, BlockKey] = {}

    def roots(self) -> list[BlockKey]:
        return [bytes.fromhex(name) for name in self._bucket.folder()[0] if is_namespace_name(name)]

    def description(self, root: BlockKey) -> bytes | None:
        """Returns what ``namespace.json`` holds; None if there is none or its server refuses it."""
        with suppress(ObjectError):
            return self._bucket.head_bytes(_name(root), MAX_DESCRIPTION_BYTES)
        return None

    def describe(self, space: Namespace) -> None:
        """Describe a namespace that is about to get a block, unless that was done within `DESCRIBE_S`."""
        if time.monotonic() - self._described_s.get(space.root, float("-inf")) <= DESCRIBE_S:
            return
        if self.description(space.root) != describe(space):
            with suppress(ObjectError):  # a namespace without a description, no more
                self._bucket.put(_name(space.root), [describe(space)])
        remember(self._described_s, space.root, time.monotonic(), MAX_REMEMBERED)

    def listed(self, root: BlockKey) -> Iterator[list[ObjectRecord] | BadFile]:
        """Yields the blocks of each shard as its list has them, or says what can't be listed now."""
        name = root.hex()
        try:
            for shard in filter(is_shard_name, self._bucket.folder(root.hex())[0]):
                name = f"{root.hex()}/{shard}"
                yield [found for found in self._bucket.folder(name)[1] if found.name.endswith(BLOCK_SUFFIX)]
        except ObjectError as error:
            yield BadFile(name, root, None, BlockFault.UNAVAILABLE, str(error))

    def note_block(self, root: BlockKey, key: BlockKey) -> None:
        """Remember that a namespace has this block. Raises nothing."""
        remember(self._known_block, root, key, MAX_REMEMBERED)

    def note_deleted(self, root: BlockKey, key: BlockKey) -> None:
        """Remove the namespace if the block that was just deleted may have been its last."""
        if self._known_block.get(root, key) == key:
            self.remove_if_empty(root)

    def is_abandoned(self, root: BlockKey) -> bool:
        """Returns True for a namespace that has had a description, but no block or bad one, for `LEFTOVER_AGE_S`."""
        if root in self._known_block:
            return False
        with suppress(ObjectError):
            found = self._bucket.record(_name(root))
            if found is not None and time.time() - found.mtime_ns / 1e9 > LEFTOVER_AGE_S:
                return not self._has_blocks(root) and not self._bucket.folder(f"{root.hex()}/{BAD}")[1]
        return False

    def remove_if_empty(self, root: BlockKey) -> None:
        """Remove what a namespace without blocks still has."""
        if self._has_blocks(root):
            return
        text = self.description(root)
        self._bucket.delete(_name(root))
        if text is not None and self._has_blocks(root):  # a writer was faster
            self._bucket.put(_name(root), [text])
            return
        self._known_block.pop(root, None)
        for bad in self._bucket.folder(f"{root.hex()}/{BAD}")[1]:
            self._bucket.delete(bad.name)

    def _has_blocks(self, root: BlockKey) -> bool:
        """Returns True if a namespace has a block, which is remembered, or can't be listed now."""
        for listed in self.listed(root):
            if isinstance(listed, BadFile):
                return True
            for key in filter(None, (key_of(found.name) for found in listed)):
                self.note_block(root, key)
                return True
        return False


def _name(root: BlockKey) -> str:
    return f"{root.hex()}/{DESCRIPTION}"
