"""What the coordinator knows of storage: the prefix index over the block store, per-tenant namespaces, eviction.

The index is in memory and rebuilt from the store at start; a block enters it only when an engine has reported it
durable and verified. Deleting and moving files is done on one background thread, in order, never on the event loop.
"""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import msgspec

from dualpath.kv.block_file import BlockFault
from dualpath.kv.catalog import rebuild
from dualpath.kv.directory import stored_namespaces
from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.store import PosixStore
from dualpath.runtime.messages import BlockFaultReport, StoredBlock


class Prefixes:
    """Prefix matching for one model. Used from one asyncio thread."""

    def __init__(
        self, directory: str, layout: KVLayout, fingerprint: str, weights_version: str, quota_bytes: int | None
    ) -> None:
        self._directory = directory
        self._layout = layout
        self._fingerprint = fingerprint
        self._weights_version = weights_version
        self._quota_bytes = quota_bytes
        self._index = PrefixIndex()
        self._stores: dict[str, PosixStore] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="store-files")
        for space in stored_namespaces(directory, layout):
            self._open(space)  # of every tenant, back or not: the quota counts what the disk holds
        self.faults: Counter[str] = Counter()
        self.evicted_blocks = 0

    def namespace_of(self, tenant: str) -> Namespace:
        """The tenant's namespace; opened on first use, unless the store had it at start."""
        known = self._namespaces.get(tenant)
        if known is None:
            known = namespace(self._fingerprint, self._weights_version, self._layout, tenant)
            self._namespaces[tenant] = known
            if known.hex not in self._stores:
                self._open(known)
        return known

    def _open(self, space: Namespace) -> None:
        """Index what the store has of a namespace; blocks that nothing can match, or that are bad, are cleaned away."""
        store = PosixStore(self._directory, self._layout, space)
        rebuild(self._index, store, clean=True)
        self._stores[space.hex] = store

    def keys(self, space: Namespace, token_ids: list[int]) -> list[BlockKey]:
        return block_keys(space.root, token_ids, self._layout.block_tokens)

    def match_and_pin(self, owner: int, keys: list[BlockKey], most_blocks: int) -> int:
        """Blocks of the longest stored prefix, at most `most_blocks`; none of them is evicted until `unpin`."""
        blocks = min(self._index.match(keys), most_blocks)
        self._index.pin(owner, keys[:blocks])
        return blocks

    def unpin(self, owner: int) -> None:
        self._index.unpin(owner)

    def publish(self, blocks: list[StoredBlock]) -> None:
        """Blocks that an engine has written and verified become visible; then the quota is enforced."""
        for block in blocks:
            published = self._index.publish(block.key, block.parent, block.physical_bytes)
            if not published and block.key not in self._index:
                # Its parent has been evicted meanwhile: nothing can ever match it, and nothing would count it.
                self._files.submit(self._delete, block.key)
        if self._quota_bytes is None:
            return
        evicted = self._index.evict(self._quota_bytes)
        self.evicted_blocks += len(evicted)
        for key in evicted:
            self._files.submit(self._delete, key)

    def report_faults(self, space: Namespace, faults: list[BlockFaultReport]) -> None:
        """Unreadable blocks: counted by cause, out of the index with all that builds on them, files moved aside."""
        store = self._stores[space.hex]
        for report in faults:
            self.faults[report.fault] += 1
            for key in self._index.drop(report.key):
                if key == report.key:
                    self._files.submit(store.quarantine, key, BlockFault(report.fault))
                else:
                    self._files.submit(store.delete, key)

    def _delete(self, key: BlockKey) -> None:
        for store in self._stores.values():
            store.delete(key)

    def gauges(self) -> dict[str, float]:
        figures = {
            f"dualpath_store_{name}": float(value)
            for name, value in msgspec.structs.asdict(self._index.statistics()).items()
        }
        figures["dualpath_store_evicted_blocks_total"] = float(self.evicted_blocks)
        for fault in BlockFault:
            figures[f'dualpath_store_faults_total{{cause="{fault.value}"}}'] = float(self.faults[fault.value])
        return figures

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        await asyncio.get_running_loop().run_in_executor(self._files, lambda: None)

    def close(self) -> None:
        self._files.shutdown(wait=True)
