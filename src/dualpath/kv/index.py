"""The prefix index: which Full Blocks are in storage, and which of them are evicted above the quota (paper §3).

Theory of operation. The index is a trie with one node per Full Block, below the root keys of its namespaces; several
namespaces share one quota. A block's key names its whole prefix, so matching is one dictionary look-up per block. A
block is published only below a published parent. It leaves only as a leaf, or with all its descendants. So every
published block can be matched from its root. A root is there as long as a block hangs from it: tenants that come and
go leave nothing.

Eviction takes the least recently used *tip*: a node without children that is not pinned. Use is counted in ticks: each
`match` and each `publish` is one. A node whose last child leaves inherits the child's tick, because a use of the child
used its whole prefix. Tips wait in a heap, each at most once, with the tick at which they entered. An entry that was
used since then goes back with its new tick when it comes up. So a use costs nothing and an eviction O(log n).
Everything is deterministic: ties are broken by the order of publication.

Not thread-safe: it belongs to one thread. The caller deletes evicted and dropped blocks from the store.
"""

from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import msgspec

from dualpath.kv.keys import KEY_BYTES, BlockKey


class IndexStatistics(msgspec.Struct, frozen=True):
    """The index's gauges now, and its counts since it was made."""

    namespaces: int
    blocks: int
    stored_bytes: int
    pinned_blocks: int
    pin_owners: int
    matches: int
    asked_blocks: int
    hit_blocks: int
    published_blocks: int
    evicted_blocks: int
    dropped_blocks: int


class GoneBlock(NamedTuple):
    """A block that has left the index: its namespace's root, its parent and its key."""

    root: BlockKey
    key: BlockKey
    parent: BlockKey


class _Node:
    """A Full Block in the trie, or a root (`parent` is None)."""

    __slots__ = ("children", "key", "parent", "physical_bytes", "pins", "queued", "root", "serial", "tick")

    def __init__(self, key: BlockKey, parent: "_Node | None", physical_bytes: int, serial: int) -> None:
        self.key = key
        self.root: BlockKey = parent.root if parent is not None else key
        self.parent = parent
        self.physical_bytes = physical_bytes
        self.serial = serial
        self.tick = 0
        self.pins = 0
        self.queued = False
        self.children: dict[BlockKey, _Node] = {}


class PrefixIndex:
    """A trie of published Full Blocks with pins and leaf-first LRU eviction; see the module's docstring."""

    def __init__(self) -> None:
        self._roots: dict[BlockKey, _Node] = {}
        self._nodes: dict[BlockKey, _Node] = {}
        self._pins: dict[Hashable, list[_Node]] = {}
        self._tips: list[tuple[int, int, _Node]] = []
        self._tick = 0
        self._serial = 0
        self._stored_bytes = 0
        self._pinned_blocks = 0
        self._matches = self._asked = self._hits = self._published = self._evicted = self._dropped = 0

    def match(self, keys: Sequence[BlockKey]) -> int:
        """Returns how many blocks at the start of `keys` are published, and marks them as used."""
        self._tick += 1
        matched = 0
        for key in keys:
            node = self._nodes.get(key)
            if node is None:
                break
            node.tick = self._tick
            matched += 1
        self._matches += 1
        self._asked += len(keys)
        self._hits += matched
        return matched

    def reach(self, keys: Sequence[BlockKey]) -> int:
        """Returns how many blocks at the start of `keys` are published; unlike `match`, marks and counts nothing."""
        return next((n for n, key in enumerate(keys) if key not in self._nodes), len(keys))

    def pin(self, owner: Hashable, keys: Sequence[BlockKey]) -> None:
        """Protect blocks from eviction until ``unpin(owner)``; the owner's earlier pins stay.

        Raises ValueError and pins nothing when a block is not published: pin what `match` has just found.
        """
        missing = next((key for key in keys if key not in self._nodes), None)
        if missing is not None:
            raise ValueError(f"block {missing.hex()} is not published and cannot be pinned; match again")
        nodes = [self._nodes[key] for key in keys]
        for node in nodes:
            node.pins += 1
            self._pinned_blocks += node.pins == 1
        self._pins.setdefault(owner, []).extend(nodes)

    def unpin(self, owner: Hashable) -> int:
        """Remove all pins of `owner`. Returns how many there were (0 for an owner without pins)."""
        nodes = self._pins.pop(owner, [])
        for node in nodes:
            node.pins -= 1
            if self._nodes.get(node.key) is node:
                self._pinned_blocks -= node.pins == 0
                self._queue(node)
        self._shed()
        return len(nodes)

    def publish(
        self, root: BlockKey, key: BlockKey, parent: BlockKey, physical_bytes: int, *, used: bool = True
    ) -> bool:
        """Make a stored block matchable, as just used, or never. Returns False if it is already, or `parent` is not.

        `root` is the root key of its namespace, `parent` the key of the block before it, or `root`. Raises ValueError
        for a negative size or a wrong key.
        """
        if not len(root) == len(key) == len(parent) == KEY_BYTES or physical_bytes < 0:
            keys = f"{key!r} after {parent!r} below {root!r}"
            raise ValueError(f"cannot publish {keys} ({KEY_BYTES} bytes each) of {physical_bytes} bytes")
        if key in self._nodes or key in self._roots or root in self._nodes or key == root:
            return False
        above = self._nodes.get(parent)
        if parent == root:
            above = self._roots.setdefault(root, _Node(root, None, 0, -1))
        if above is None or above.root != root:
            return False
        self._tick += 1
        self._serial += 1
        node = _Node(key, above, physical_bytes, self._serial)
        node.tick = self._tick if used else 0
        above.children[key] = node
        self._nodes[key] = node
        self._stored_bytes += physical_bytes
        self._published += 1
        self._queue(node)
        return True

    def drop(self, key: BlockKey) -> list[GoneBlock]:
        """Forget a block that is gone or bad, pinned or not, with all its descendants.

        Returns the forgotten blocks, each after its descendants; none if `key` is not published. Their pins end.
        """
        top = self._nodes.get(key)
        if top is None:
            return []
        subtree = [top]
        for node in subtree:
            subtree.extend(node.children.values())
        subtree.reverse()
        gone = [self._remove(node) for node in subtree]
        self._dropped += len(subtree)
        self._shed()
        return gone

    def evict(self, quota_bytes: int) -> list[GoneBlock]:
        """Forget least recently used tips until `stored_bytes` ≤ `quota_bytes` or all remaining blocks are pinned.

        Returns the forgotten blocks, each after its descendants; the caller deletes them from the store.
        """
        evicted = []
        while self._stored_bytes > quota_bytes and self._tips:
            tick, _, node = heappop(self._tips)
            node.queued = False
            if tick < node.tick:
                self._queue(node)
            elif self._is_evictable(node):
                evicted.append(self._remove(node))
        self._evicted += len(evicted)
        self._shed()
        return evicted

    def __contains__(self, key: object) -> bool:
        return key in self._nodes

    @property
    def roots(self) -> list[BlockKey]:
        """Root keys of the namespaces, in the order they were added."""
        return list(self._roots)

    @property
    def blocks(self) -> int:
        """Number of published blocks."""
        return len(self._nodes)

    @property
    def stored_bytes(self) -> int:
        """Physical bytes of all published blocks."""
        return self._stored_bytes

    def statistics(self) -> IndexStatistics:
        """Gauges and counters, O(1)."""
        return IndexStatistics(
            namespaces=len(self._roots),
            blocks=len(self._nodes),
            stored_bytes=self._stored_bytes,
            pinned_blocks=self._pinned_blocks,
            pin_owners=len(self._pins),
            matches=self._matches,
            asked_blocks=self._asked,
            hit_blocks=self._hits,
            published_blocks=self._published,
            evicted_blocks=self._evicted,
            dropped_blocks=self._dropped,
        )

    def audit(self) -> None:
        """Check every invariant, O(blocks). Raises AssertionError that names the broken one."""
        reached = list(self._roots.values())
        for node in reached:
            reached.extend(node.children.values())
        _require(all(root.children for root in self._roots.values()), "a root goes with its last block")
        _require(len(reached) == len(self._roots) + len(self._nodes), "every published block hangs from a root")
        held = [node for nodes in self._pins.values() for node in nodes]
        for node in self._nodes.values():
            _require(node.parent is not None and node.parent.children.get(node.key) is node, "a parent knows its child")
            _require(not self._is_evictable(node) or node.queued, "every tip that may go waits for eviction")
        waiting = [node for _, _, node in self._tips if self._nodes.get(node.key) is node]
        _require(len({id(node) for node in waiting}) == len(waiting), "no block waits twice")
        _require(all(node.queued for node in waiting), "a block that waits knows it")
        _require(all(tick <= node.tick for tick, _, node in self._tips), "no entry is newer than its block")
        _require(len(self._tips) <= 2 * len(self._nodes) + 64, "the heap is bounded by the blocks")
        _require(self._stored_bytes == sum(node.physical_bytes for node in self._nodes.values()), "bytes add up")
        _require(sum(node.pins for node in {id(n): n for n in held}.values()) == len(held), "pins add up")
        pinned = [node for node in self._nodes.values() if node.pins]
        _require(len(pinned) == self._pinned_blocks, "pinned blocks add up")
        _require({id(node) for node in pinned} <= {id(node) for node in held}, "every pin has an owner")
        _require(len(self._nodes) == self._published - self._evicted - self._dropped, "blocks come and go by count")

    def _is_evictable(self, node: _Node) -> bool:
        return not node.children and not node.pins and self._nodes.get(node.key) is node

    def _queue(self, node: _Node) -> None:
        """Put `node` into the heap if it is a tip and not in the heap already."""
        if node.queued or not self._is_evictable(node):
            return
        node.queued = True
        heappush(self._tips, (node.tick, node.serial, node))

    def _shed(self) -> None:
        """Remove stale entries from the heap once they outnumber the blocks: without evictions they pile up."""
        if len(self._tips) <= 2 * len(self._nodes) + 64:
            return
        for _, _, node in self._tips:
            node.queued = self._is_evictable(node)
        self._tips = [(node.tick, node.serial, node) for _, _, node in self._tips if node.queued]
        heapify(self._tips)

    def _remove(self, node: _Node) -> GoneBlock:
        """Take a node without children out of the trie; its parent may become a tip."""
        assert node.parent is not None and not node.children
        del self._nodes[node.key]
        del node.parent.children[node.key]
        self._stored_bytes -= node.physical_bytes
        self._pinned_blocks -= node.pins > 0
        node.parent.tick = max(node.parent.tick, node.tick)
        self._queue(node.parent)
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.key]
        return GoneBlock(node.root, node.key, node.parent.key)


def _require(holds: bool, invariant: str) -> None:
    if not holds:
        raise AssertionError(f"prefix index: it does not hold that {invariant}")
