"""What the coordinator knows of storage: the prefix index over the block store, per-tenant namespaces, eviction.

The index is in memory and rebuilt from the store at start; a block enters it only when an engine has reported it
durable and verified. Everything that touches files (rebuilding, opening a namespace, deleting, setting aside) is done
on one background thread, in order, never on the event loop. A file job that fails is counted and logged: serving does
not depend on it.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.kv.block_file import BlockFault
from dualpath.kv.catalog import rebuild
from dualpath.kv.index import PrefixIndex
from dualpath.kv.keys import BlockKey, Namespace, block_keys, namespace
from dualpath.kv.layout import KVLayout
from dualpath.kv.storage import Storage
from dualpath.kv.store import Store, StoreError
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures


class Prefixes:
    """Prefix matching for one model. Used from one asyncio thread, `load` first of all."""

    def __init__(
        self, location: str, layout: KVLayout, fingerprint: str, weights_version: str, quota_bytes: int | None
    ) -> None:
        self._storage = Storage(location, layout)
        self._layout = layout
        self._fingerprint = fingerprint
        self._weights_version = weights_version
        self._quota_bytes = quota_bytes
        self._index = PrefixIndex()
        self._stores: dict[str, Store] = {}
        self._namespaces: dict[str, Namespace] = {}
        self._opening: dict[str, asyncio.Future[Store]] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="store-files")
        self._file_jobs = 0
        self.faults: Counter[str] = Counter()
        self.file_errors = 0

    async def load(self) -> None:
        """Index what the store has, of every tenant, back or not: the quota counts what the disk holds.

        Blocks that nothing can match, or that are bad, are cleaned away. Raises StoreError, OSError.
        """
        await asyncio.get_running_loop().run_in_executor(self._files, self._load)
        self._enforce_quota()

    def _load(self) -> None:
        """On the background thread; nobody else has the index yet."""
        self._storage.open(self.namespace_of(""))  # fails now rather than at the first block
        for space in self._storage.namespaces():
            store = self._storage.open(space)
            rebuild(self._index, store, clean=True)
            self._stores[space.hex] = store

    def namespace_of(self, tenant: str) -> Namespace:
        known = self._namespaces.get(tenant)
        if known is None:
            known = namespace(self._fingerprint, self._weights_version, self._layout, tenant)
            self._namespaces[tenant] = known
        return known

    async def open(self, tenant: str) -> Namespace:
        """The tenant's namespace, ready to match and publish. One whose directory can't be opened matches nothing."""
        space = self.namespace_of(tenant)
        if space.hex not in self._stores:
            opening = self._opening.get(space.hex)
            if opening is None:
                loop = asyncio.get_running_loop()
                opening = loop.run_in_executor(self._files, self._storage.open, space)
                self._opening[space.hex] = opening
                opening.add_done_callback(lambda opened: self._opened(space, opened))
            await asyncio.wait([opening])
        return space

    def _opened(self, space: Namespace, opened: "asyncio.Future[Store]") -> None:
        """Before anybody who waits goes on."""
        del self._opening[space.hex]
        self._index.add_root(space.root)
        if opened.cancelled():
            return
        try:
            store = opened.result()
            rebuild(self._index, store, clean=True)  # it was not described when `load` looked: it has next to nothing
        except StoreError as error:
            self._note_file_error(error)
            return
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
                self._submit(self._delete, block.key)
        self._enforce_quota()

    def _enforce_quota(self) -> None:
        if self._quota_bytes is None:
            return
        for key in self._index.evict(self._quota_bytes):
            self._submit(self._delete, key)

    def report_faults(self, space: Namespace, faults: list[BlockFaultReport]) -> None:
        """Unreadable blocks: counted by cause, out of the index with all that builds on them, files moved aside."""
        for report in faults:
            self.faults[report.fault] += 1
            for key in self._index.drop(report.key):
                if key == report.key:
                    self._submit(self._set_aside, space, key, BlockFault(report.fault))
                else:
                    self._submit(self._delete, key)

    # ── the background thread ───────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, job: Callable[..., None], *arguments: object) -> None:
        """Jobs waiting are bounded by the blocks that have been in the index: each is about one that left it."""
        self._file_jobs += 1
        loop = asyncio.get_running_loop()
        done = self._files.submit(job, *arguments)
        done.add_done_callback(lambda ended: loop.call_soon_threadsafe(self._on_job_done, ended))

    def _on_job_done(self, ended: "Future[None]") -> None:
        self._file_jobs -= 1
        error = None if ended.cancelled() else ended.exception()
        if error is not None:
            self._note_file_error(error)

    def _note_file_error(self, error: BaseException) -> None:
        self.file_errors += 1
        print(f"[store] {error}", file=sys.stderr, flush=True)

    def _delete(self, key: BlockKey) -> None:
        if key not in self._index:  # it may have been stored anew meanwhile
            any(store.delete(key) for store in list(self._stores.values()))

    def _set_aside(self, space: Namespace, key: BlockKey, cause: BlockFault) -> None:
        store = self._stores.get(space.hex)
        if store is not None and key not in self._index:
            store.quarantine(key, cause)

    # ── what to look at ─────────────────────────────────────────────────────────────────────────────────────────────

    def gauges(self) -> Figures:
        index = self._index.statistics()
        return {
            metrics.STORE_NAMESPACES(): float(index.namespaces),
            metrics.STORE_BLOCKS(): float(index.blocks),
            metrics.STORE_BYTES(): float(index.stored_bytes),
            metrics.STORE_PINNED_BLOCKS(): float(index.pinned_blocks),
            metrics.STORE_PIN_OWNERS(): float(index.pin_owners),
            metrics.STORE_MATCHES(): float(index.matches),
            metrics.STORE_ASKED_BLOCKS(): float(index.asked_blocks),
            metrics.STORE_HIT_BLOCKS(): float(index.hit_blocks),
            metrics.STORE_PUBLISHED_BLOCKS(): float(index.published_blocks),
            metrics.STORE_EVICTED_BLOCKS(): float(index.evicted_blocks),
            metrics.STORE_DROPPED_BLOCKS(): float(index.dropped_blocks),
            metrics.STORE_FILE_ERRORS(): float(self.file_errors),
            metrics.STORE_FILE_JOBS(): float(self._file_jobs),
            **{metrics.STORE_FAULTS(fault.value): float(self.faults[fault.value]) for fault in BlockFault},
        }

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        await asyncio.get_running_loop().run_in_executor(self._files, lambda: None)
        await asyncio.sleep(0)

    def close(self) -> None:
        """Wait for the file work queued so far."""
        self._files.shutdown(wait=True)
