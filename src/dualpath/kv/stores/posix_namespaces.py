"""`NamespaceFolders`: a namespace has folders from its first block until its last one has gone.

A million tenants that store nothing leave nothing. Writers and removers of several processes meet here without locks:

* A remover deletes ``namespace.json`` **first**, then the empty folders. `rmdir` fails where somebody has a file, so a
  draft holds its folders. A remover that fails half-way describes the namespace again.
* A writer settles the folders (makes, describes and flushes them), begins its draft, which holds them from now on, and
  settles them **again**. What it settled before is known by the identity of ``namespace.json``: if that is still the
  same, no folder has been removed in between, and nothing is to do.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from dualpath.kv.keys import BlockKey, Namespace
from dualpath.kv.stores.entries import NOT_THERE, is_empty, names, remove
from dualpath.kv.stores.errors import BlockFault
from dualpath.kv.stores.naming import BAD, DESCRIPTION, describe, is_shard_name
from dualpath.kv.stores.posix_directory import StoreDirectory
from dualpath.kv.stores.remembered import remember
from dualpath.spec.whole_file import LEFTOVER_AGE_S, Draft, fill_whole, fsync_directory

MAX_SETTLED = 1 << 14
"""Most shards that a process remembers; 256 shards of 64 namespaces."""
ATTEMPTS = 8
"""Folders that are removed again and again while they are made: a writer gives up then."""


class NamespaceFolders:
    """The folders of a store's namespaces. Methods pass OSError on. Safe to use from several threads."""

    def __init__(self, files: StoreDirectory, *, durable: bool) -> None:
        self._files = files
        self._durable = durable
        self._settled: dict[Path, tuple[int, int]] = {}
        self._used: dict[BlockKey, Path] = {}  # a shard of each namespace that was not empty when last looked at

    def begin(self, space: Namespace, block: Path) -> Draft:
        """Begin the file of a block, in folders that are described and, if durable, flushed."""
        for attempt in range(1, ATTEMPTS + 1):
            draft = None
            try:
                self.settle(space, block.parent)
                draft = self._files.draft(block)
                self.settle(space, block.parent)
            except OSError as error:
                if draft is not None:
                    draft.discard()
                self._settled.pop(block.parent, None)
                if error.errno not in NOT_THERE or attempt == ATTEMPTS:
                    raise
            else:
                return draft
        raise AssertionError("the last attempt returns or raises")

    def settle(self, space: Namespace, shard: Path) -> None:
        """Make and describe a shard's folders and flush their names, unless this process has done it for these."""
        identity = self._identity(space.root)
        if identity is not None and self._settled.get(shard) == identity:
            return
        if self._files.make_store() and self._durable:
            fsync_directory(self._files.path.parent)
        self._files.make_folder(shard.parent)
        if self._files.description(space.root) != describe(space):
            self.describe(space.root, describe(space))
        identity = self._identity(space.root)
        self._files.make_folder(shard)
        if self._durable:
            for folder in (shard.parent, self._files.path):
                fsync_directory(folder)
        if identity is not None:
            remember(self._settled, shard, identity, MAX_SETTLED)

    def describe(self, root: BlockKey, text: bytes) -> None:
        """Write a namespace's description, in place of whatever is there."""
        path = self._files.namespace(root) / DESCRIPTION
        try:
            fill_whole(self._files.draft(path), text, durable=self._durable)
        except IsADirectoryError:
            self._files.set_aside(path, BlockFault.HEADER, folder=True)
            fill_whole(self._files.draft(path), text, durable=self._durable)

    def remove_if_empty(self, root: BlockKey) -> bool:
        """Remove a namespace without blocks and drafts, and what it has in quarantine. Returns True if it did."""
        folder, text = self._files.namespace(root), None
        try:
            used = self._used.get(root)
            if used is not None and not is_empty(used):
                return False
            shards = self._files.shards(root)
            used = next((shard for shard in reversed(shards) if not is_empty(shard)), None)
            if used is not None:
                remember(self._used, root, used, MAX_SETTLED)
                return False
            text = self._files.description(root)
            (folder / DESCRIPTION).unlink(missing_ok=True)
            for shard in shards:
                shard.rmdir()
            remove(folder / BAD)
            folder.rmdir()
        except OSError:  # a writer was faster, or somebody keeps something of theirs there
            if text is not None:
                with suppress(OSError):
                    self.describe(root, text)
            return False
        return True

    def is_abandoned(self, root: BlockKey) -> bool:
        """Returns True for a namespace that has held no file, nor a quarantined one, for `LEFTOVER_AGE_S`."""
        folder = self._files.namespace(root)
        try:
            below = names(folder)
            shards = [name for name in below if is_shard_name(name)]
            if {*below} - {*shards, DESCRIPTION, BAD} or not all(is_empty(folder / name) for name in [*shards, BAD]):
                return False
            return time.time() - folder.stat().st_mtime > LEFTOVER_AGE_S
        except OSError:
            return False

    def _identity(self, root: BlockKey) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._files.namespace(root) / DESCRIPTION)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns
