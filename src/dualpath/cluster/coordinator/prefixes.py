"""The coordinator's view of storage: the prefix index over the block store, namespaces of tenants, eviction.

The index is in memory and is rebuilt from the store at start. A block enters it when an engine has reported it durable
and verified, or when a look at the store (`lookout`) finds that a neighbour, another cluster on the same store, has
written it. A block that an engine can't read just now stays, and is a miss for a while.

No request and no event waits for the store, but for a look, and for that not longer than `lookout.LOOK_S`: file work is
done later (`file_work`). Of a tenant nothing is remembered but its blocks; its namespace is derived from its salt.
"""

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping

from dualpath.cluster.coordinator.file_work import LANES, FileWork
from dualpath.cluster.coordinator.kv_events import KVEvents
from dualpath.cluster.coordinator.lookout import Lookout, Recently
from dualpath.cluster.coordinator.recount import Recount
from dualpath.cluster.guarded_store import guarded
from dualpath.cluster.messages import BlockFaultReport, StoredBlock
from dualpath.cluster.store_standing import troubles_s
from dualpath.kv import (
    BlockFault,
    BlockKey,
    BlockRecord,
    GoneBlock,
    KVLayout,
    Namespace,
    PrefixIndex,
    Store,
    StoreError,
    block_keys,
    namespace,
    open_store,
    publish_all,
    rebuild,
)
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

UNAVAILABLE_S = 10.0
"""How long a block that could not be read is a miss."""
MAX_UNAVAILABLE = 4096
"""Most such blocks that are remembered."""
CLOSE_S = 5.0
"""How long work in progress may take at the end."""


class Prefixes:
    """Prefix matching for one model. Used from one asyncio thread; call `load` first. Raises StoreLocationError.

    `timeout_s` is the longest time that one call of the store may take.
    """

    def __init__(
        self,
        location: str,
        layout: KVLayout,
        fingerprint: str,
        weights_version: str,
        quota_bytes: int | None,
        events: KVEvents | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = 10.0,
        store: Store | None = None,
        file_lanes: int = LANES,
    ) -> None:
        self._store = guarded(store or open_store(location))
        self._layout = layout
        self._fingerprint = fingerprint
        self._weights_version = weights_version
        self._quota_bytes = quota_bytes
        self._events = events or KVEvents(None)
        self._index = PrefixIndex()
        self._generation = ""
        self._files = FileWork(self._store, self._index, timeout_s, clock, file_lanes)
        self._lookout = Lookout(self._store, self._take_over, timeout_s, clock)
        self._recount = Recount(self._store, self._index, timeout_s, self._enforce_quota, clock)
        self._unavailable = Recently(UNAVAILABLE_S, MAX_UNAVAILABLE, clock)
        self.faults: Counter[BlockFault] = Counter()
        self.found_blocks = 0
        self.refused_blocks = 0

    async def load(self) -> None:
        """Index the store's blocks of every tenant and model, because the quota counts all of them.

        Deletes blocks that nothing can match and quarantines bad ones. Raises StoreError when the store can't be read.
        """
        await self._files.threads.submit(lambda _: self._load(), deadline_s=math.inf).future
        self._enforce_quota()

    def _load(self) -> None:
        """Runs on the file thread; no other thread uses the index yet."""
        refusal = None
        try:
            self._store.prepare(self.namespace_of(""))
        except StoreError as error:
            refusal = error
        try:
            report = rebuild(self._index, self._store, clean=refusal is None)
        except StoreError as error:
            raise refusal or error from None
        self._files.forgotten = bool(report.unavailable)
        if refusal is not None:  # it can be read: what is stored is served, although nothing can be added
            self._files.standing.failed(math.inf)
            self._files.complaints.add(refusal)

    def namespace_of(self, tenant: str) -> Namespace:
        return namespace(self._fingerprint, self._weights_version + self._generation, self._layout, tenant)

    def serve_weights(self, fingerprint: str) -> None:
        """From now on match only KV of these weights, whatever their version is called: older KV of theirs hits too."""
        self._fingerprint = fingerprint
        self._events.cleared()

    def forget(self) -> None:
        """From now on match nothing that is stored already. Its blocks stay until they are evicted, and a restarted
        cluster matches them again."""
        self._generation = f"/{uuid.uuid4().hex}"
        self._events.cleared()

    async def look_beyond(self, space: Namespace, keys: list[BlockKey]) -> None:
        """Publish the blocks of `keys` that the store has and the index lacks, which neighbours have written."""
        await self._lookout.look(space.root, keys[self._index.reach(keys) :])

    def _take_over(self, found: list[BlockRecord]) -> None:
        self.found_blocks += len(found)
        publish_all(self._index, found)
        self._enforce_quota()

    def keys(self, space: Namespace, token_ids: list[int]) -> list[BlockKey]:
        keys = block_keys(space.root, token_ids, self._layout.block_tokens)
        self._events.expect(space, keys, token_ids, self._index.reach(keys))
        return keys

    def match_and_pin(self, owner: int, keys: list[BlockKey], most_blocks: int) -> int:
        """Returns the longest stored prefix in blocks, up to `most_blocks`. Eviction spares it until `unpin`."""
        blocks = min(self._index.match(keys), most_blocks)
        if len(self._unavailable):
            blocks = next((n for n, key in enumerate(keys[:blocks]) if key in self._unavailable), blocks)
        self._index.pin(owner, keys[:blocks])
        return blocks

    def unpin(self, owner: int) -> None:
        self._index.unpin(owner)

    def publish(self, blocks: list[StoredBlock]) -> None:
        """Publish blocks that an engine has written and verified, then evict down to the quota."""
        published = []
        for block in blocks:
            try:
                entered = self._index.publish(block.root, block.key, block.parent, block.physical_bytes)
            except ValueError:  # no engine of ours says such a thing
                self.refused_blocks += 1
                continue
            if entered:
                published.append(block)
            elif block.key not in self._index:
                # Its parent has been evicted meanwhile, so nothing can match it and the quota would not count it.
                self._files.delete_orphans([GoneBlock(block.root, block.key, block.parent)])
        self._events.stored(published, self._index)
        self._enforce_quota()

    def _enforce_quota(self) -> None:
        if self._quota_bytes is None:
            return
        evicted = self._index.evict(self._quota_bytes)
        if evicted:
            self._events.removed(block.key for block in evicted)
            self._files.delete(evicted)
        if not self._files.standing.failing_s and self._recount.begin(self._files.forgotten):
            self._files.forgotten = False

    def report_faults(self, faults: list[BlockFaultReport]) -> None:
        """Count unreadable blocks by cause. Bad ones leave with their descendants, and their files are set aside."""
        for report in faults:
            fault = _FAULTS.get(report.fault, BlockFault.UNAVAILABLE)
            self.faults[fault] += 1
            if fault is BlockFault.UNAVAILABLE:
                self._unavailable.add(report.key)
                continue
            gone = self._index.drop(report.key)[::-1]
            if gone:
                self._events.removed(block.key for block in gone)
                self._files.set_aside(gone[0])
                self._files.delete_orphans(gone[1:])

    # ── what to look at ─────────────────────────────────────────────────────────────────────────────────────────────

    def troubles_s(self) -> Mapping[str, float]:
        """Returns what is wrong with the store as seen from here, and for how long (`cluster.store_standing`)."""
        return troubles_s(self._lookout.standing, self._files.standing)

    def gauges(self) -> Figures:
        index = self._index.statistics()
        figures: Figures = {
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
            metrics.STORE_REFUSED_BLOCKS(): float(self.refused_blocks),
            metrics.STORE_LOOKS(): float(self._lookout.looks),
            metrics.STORE_FOUND_BLOCKS(): float(self.found_blocks),
            metrics.STORE_RECOUNTS(): float(self._recount.begun),
            metrics.STORE_FILE_ERRORS(): float(self._files.complaints.count + self._lookout.complaints.count),
            metrics.STORE_FILE_JOBS(): float(self._files.waiting),
            **{metrics.STORE_FAULTS(fault.value): float(self.faults[fault]) for fault in BlockFault},
        }
        for work, threads in (("look", self._lookout.threads), ("file", self._files.threads)):
            figures[metrics.STORE_IO_RUNNING(work)] = float(threads.running)
            figures[metrics.STORE_IO_HUNG(work)] = float(threads.hung)
            figures[metrics.STORE_IO_LATE(work)] = float(threads.late_calls)
        return figures

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        await self._files.settled()

    def close(self) -> None:
        """Wait for the work in progress, but for none that hangs."""
        self._files.close(CLOSE_S)
        self._lookout.close(CLOSE_S)
        self._recount.close()


_FAULTS = {fault.value: fault for fault in BlockFault}
