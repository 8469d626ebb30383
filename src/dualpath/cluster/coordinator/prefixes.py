"""The coordinator's view of storage: the prefix index over the block store, per-tenant namespaces, eviction.

The index is in memory and is rebuilt from the store at start. A block enters it when an engine has reported it durable
and verified, or when a look at the store finds that a neighbour (another cluster on the same store) has written it. All
file work runs on threads, never on the event loop: eviction and repairs on one thread, in order; looks, for which
requests wait, on others. A file job that fails is counted and logged; serving does not depend on it.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from dualpath.cluster.coordinator.kv_events import KVEvents
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.kv import (
    BlockFault,
    BlockKey,
    BlockRecord,
    GoneBlock,
    KVLayout,
    Namespace,
    PrefixIndex,
    block_keys,
    delete_orphan,
    namespace,
    open_store,
    publish_all,
    rebuild,
)
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Longest time a request waits for a look at the store; blocks found later are published then."""
MAX_LOOKS = 4
"""Most looks at the same time. A request that finds all of them busy goes on without one."""
ABSENT_S = 1.0
"""How long an absent block is not looked for again, and how long nothing is after the store has failed to answer."""
MAX_ABSENT = 4096
"""Most blocks that are remembered as absent."""


class Prefixes:
    """Prefix matching for one model. Used from one asyncio thread; call `load` first. Raises StoreLocationError."""

    def __init__(
        self,
        location: str,
        layout: KVLayout,
        fingerprint: str,
        weights_version: str,
        quota_bytes: int | None,
        events: KVEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = open_store(location)
        self._layout = layout
        self._fingerprint = fingerprint
        self._weights_version = weights_version
        self._quota_bytes = quota_bytes
        self._events = events or KVEvents(None)
        self._clock = clock
        self._index = PrefixIndex()
        self._namespaces: dict[str, Namespace] = {}
        self._generation = ""
        self._ready: set[BlockKey] = set()
        self._preparing: dict[BlockKey, asyncio.Future[None]] = {}
        self._files = ThreadPoolExecutor(1, thread_name_prefix="store-files")
        self._lookout = ThreadPoolExecutor(MAX_LOOKS, thread_name_prefix="store-looks")
        self._looks: dict[BlockKey, asyncio.Future[list[BlockRecord]]] = {}
        self._absent_until: dict[BlockKey, float] = {}
        self._away_until = float("-inf")
        self._file_jobs = 0
        self.faults: Counter[str] = Counter()
        self.file_errors = 0
        self.looks = 0
        self.found_blocks = 0

    async def load(self) -> None:
        """Index the store's blocks of every tenant and model, because the quota counts all of them.

        Deletes blocks that nothing can match and quarantines bad ones. Raises StoreError when the store can't be used.
        """
        await asyncio.get_running_loop().run_in_executor(self._files, self._load)
        self._enforce_quota()

    def _load(self) -> None:
        """Runs on the file thread; no other thread uses the index yet."""
        self._store.prepare(self.namespace_of(""))  # fails now rather than at the first block
        rebuild(self._index, self._store, clean=True)

    def namespace_of(self, tenant: str) -> Namespace:
        known = self._namespaces.get(tenant)
        if known is None:
            known = namespace(self._fingerprint, self._weights_version + self._generation, self._layout, tenant)
            self._namespaces[tenant] = known
        return known

    def serve_weights(self, fingerprint: str) -> None:
        """From now on match only KV of these weights, whatever their version is called: older KV of theirs hits too."""
        self._fingerprint = fingerprint
        self._namespaces.clear()
        self._events.cleared()

    def forget(self) -> None:
        """From now on match nothing that is stored already. Its blocks stay until they are evicted, and a restarted
        cluster matches them again."""
        self._generation = f"/{uuid.uuid4().hex}"
        self._namespaces.clear()
        self._events.cleared()

    async def open(self, tenant: str) -> Namespace:
        """Returns the tenant's namespace, ready to match and publish. One that can't be prepared matches nothing."""
        space = self.namespace_of(tenant)
        if space.root not in self._ready:
            preparing = self._preparing.get(space.root)
            if preparing is None:
                loop = asyncio.get_running_loop()
                preparing = loop.run_in_executor(self._files, self._store.prepare, space)
                self._preparing[space.root] = preparing
                preparing.add_done_callback(lambda ended: self._prepared(space, ended))
            await asyncio.wait([preparing])
        return space

    def _prepared(self, space: Namespace, ended: "asyncio.Future[None]") -> None:
        """Runs before the requests that wait continue. Neighbours' blocks of this tenant are found when asked for."""
        del self._preparing[space.root]
        self._index.add_root(space.root)
        if ended.cancelled():
            return
        error = ended.exception()
        if error is None:
            self._ready.add(space.root)
        else:
            self._note_file_error(error)

    async def look_beyond(self, space: Namespace, keys: list[BlockKey]) -> None:
        """Publish the blocks of `keys` that the store has and the index lacks, which neighbours have written.

        New tokens cost one look for one block, and no look when that block was absent within `ABSENT_S`.
        """
        beyond = keys[self._index.reach(keys) :]
        now = self._clock()
        if not beyond or now < self._away_until or now < self._absent_until.get(beyond[0], now):
            return
        look = self._looks.get(beyond[0])
        if look is None:
            if len(self._looks) >= MAX_LOOKS:
                return
            self.looks += 1
            loop = asyncio.get_running_loop()
            look = loop.run_in_executor(self._lookout, self._store.find, space.root, beyond)
            self._looks[beyond[0]] = look
            look.add_done_callback(lambda ended: self._looked(beyond, ended))
        await asyncio.wait([look], timeout=LOOK_S)

    def _looked(self, beyond: list[BlockKey], ended: "asyncio.Future[list[BlockRecord]]") -> None:
        """Runs before the requests that wait continue."""
        del self._looks[beyond[0]]
        if ended.cancelled():
            return
        error = ended.exception()
        if error is not None:
            self._away_until = self._clock() + ABSENT_S
            self._note_file_error(error)
            return
        found = ended.result()
        self.found_blocks += len(found)
        publish_all(self._index, found)
        self._enforce_quota()
        for absent in beyond[len(found) : len(found) + 1]:
            self._absent_until.pop(absent, None)
            self._absent_until[absent] = self._clock() + ABSENT_S
        while len(self._absent_until) > MAX_ABSENT:
            del self._absent_until[next(iter(self._absent_until))]

    def keys(self, space: Namespace, token_ids: list[int]) -> list[BlockKey]:
        keys = block_keys(space.root, token_ids, self._layout.block_tokens)
        self._events.expect(space, keys, token_ids, self._index.reach(keys))
        return keys

    def match_and_pin(self, owner: int, keys: list[BlockKey], most_blocks: int) -> int:
        """Returns the longest stored prefix in blocks, up to `most_blocks`. Eviction spares it until `unpin`."""
        blocks = min(self._index.match(keys), most_blocks)
        self._index.pin(owner, keys[:blocks])
        return blocks

    def unpin(self, owner: int) -> None:
        self._index.unpin(owner)

    def publish(self, blocks: list[StoredBlock]) -> None:
        """Publish blocks that an engine has written and verified, then evict down to the quota."""
        published = []
        for block in blocks:
            if self._index.publish(block.key, block.parent, block.physical_bytes):
                published.append(block)
            elif block.key not in self._index:
                # Its parent has been evicted meanwhile, so nothing can match it and the quota would not count it.
                self._submit(
                    self._delete_orphans, [GoneBlock(root, block.key, block.parent) for root in self._index.roots]
                )
        self._events.stored(published, self._index)
        self._enforce_quota()

    def _enforce_quota(self) -> None:
        if self._quota_bytes is None:
            return
        evicted = self._index.evict(self._quota_bytes)
        if evicted:
            self._events.removed(block.key for block in evicted)
            self._submit(self._delete, evicted)

    def report_faults(self, faults: list[BlockFaultReport]) -> None:
        """Count unreadable blocks by cause, drop them and their descendants, and quarantine their files."""
        for report in faults:
            self.faults[report.fault] += 1
            gone = self._index.drop(report.key)[::-1]
            if gone:
                self._events.removed(block.key for block in gone)
                self._submit(self._set_aside, gone[0])
                self._submit(self._delete_orphans, gone[1:])

    # ── the background thread ───────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, job: Callable[..., None], *arguments: object) -> None:
        """Queue file work. The queue is bounded by the blocks of the index: each job is about some that left it."""
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
        logger.warning("%s", error)

    def _delete(self, blocks: list[GoneBlock]) -> None:
        for block in blocks:
            if block.key not in self._index:  # it may have been stored again meanwhile
                self._store.delete(block.root, block.key)

    def _delete_orphans(self, blocks: list[GoneBlock]) -> None:
        """Delete parents first. If a neighbour has written a parent again, the block stays, and a look finds it."""
        for block in blocks:
            if block.key not in self._index:
                delete_orphan(self._store, block.root, block.parent, block.key)

    def _set_aside(self, block: GoneBlock) -> None:
        if block.key not in self._index:
            self._store.quarantine(block.root, block.key)

    # ── what to look at ─────────────────────────────────────────────────────────────────────────────────────────────

    def gauges(self) -> Figures:
        index = self._index.statistics()
        return {
            **self._events.gauges(),
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
            metrics.STORE_LOOKS(): float(self.looks),
            metrics.STORE_FOUND_BLOCKS(): float(self.found_blocks),
            metrics.STORE_FILE_ERRORS(): float(self.file_errors),
            metrics.STORE_FILE_JOBS(): float(self._file_jobs),
            **{metrics.STORE_FAULTS(fault.value): float(self.faults[fault.value]) for fault in BlockFault},
        }

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        await asyncio.get_running_loop().run_in_executor(self._files, lambda: None)
        await asyncio.sleep(0)

    def close(self) -> None:
        """Wait for the file work queued so far and for looks in progress."""
        self._files.shutdown(wait=True)
        self._lookout.shutdown(wait=True)
