import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dualpath.kv.index import GoneBlock, PrefixIndex
from dualpath.kv.keys import BlockKey

Path = tuple[int, ...]  # a block in the model: (root, branch, branch, …); a root is a path of one


def key_of(path: Path) -> BlockKey:
    return bytes(path).ljust(15, b"\xff") + bytes([len(path)])


def prefixes(path: Path) -> list[Path]:
    return [path[:n] for n in range(2, len(path) + 1)]


def keys_of(path: Path) -> list[BlockKey]:
    return [key_of(prefix) for prefix in prefixes(path)]


def keys_gone(blocks: list[GoneBlock]) -> list[BlockKey]:
    return [block.key for block in blocks]


PICKS = st.integers(0, 10**6)


class IndexAgainstModel(RuleBasedStateMachine):
    """The index against a dictionary of paths that finds its victims by looking at everything."""

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex()
        self.size_bytes: dict[Path, int] = {}
        self.last_use: dict[Path, int] = {}
        self.pins: dict[int, list[Path]] = {}
        self.now = 0

    def touch(self, path: Path) -> None:
        for prefix in prefixes(path):
            self.last_use[prefix] = self.now

    def below(self, path: Path) -> list[Path]:
        return [other for other in self.size_bytes if other[: len(path)] == path]

    def forget(self, path: Path) -> None:
        del self.size_bytes[path]
        for pinned in self.pins.values():
            pinned[:] = [other for other in pinned if other != path]

    def pick(self, number: int) -> Path:
        """A published block, or a child that one of them or a root may have."""
        published = sorted(self.size_bytes)
        children = [(*path, branch) for path in [(0,), (1,), *published] for branch in (0, 1)]
        candidates = published + children
        return candidates[number % len(candidates)]

    @rule(pick=PICKS, n_bytes=st.sampled_from([5, 1, 9, 0]), tail=st.sampled_from([(), (), (), (2,)]))
    def publish(self, pick: int, n_bytes: int, tail: Path) -> None:
        path = self.pick(pick) + tail
        expected = path not in self.size_bytes and (len(path) == 2 or path[:-1] in self.size_bytes)
        assert self.index.publish(key_of(path[:1]), key_of(path), key_of(path[:-1]), n_bytes) == expected
        if expected:
            self.now += 1
            self.size_bytes[path] = n_bytes
            self.touch(path)

    @rule(pick=PICKS)
    def match(self, pick: int) -> None:
        self.now += 1
        path = self.pick(pick)
        expected = sum(prefix in self.size_bytes for prefix in prefixes(path))
        assert self.index.match(keys_of(path)) == expected
        self.touch(path[: expected + 1])

    @rule(pick=PICKS, owner=st.integers(0, 3))
    def pin(self, pick: int, owner: int) -> None:
        path = self.pick(pick)
        if path in self.size_bytes:
            self.index.pin(owner, keys_of(path))
            self.pins.setdefault(owner, []).extend(prefixes(path))
        else:
            with pytest.raises(ValueError, match="is not published and cannot be pinned"):
                self.index.pin(owner, keys_of(path))

    @rule(owner=st.integers(0, 3))
    def unpin(self, owner: int) -> None:
        self.index.unpin(owner)
        self.pins.pop(owner, None)

    @rule(pick=PICKS)
    def drop(self, pick: int) -> None:
        path = self.pick(pick)
        gone = self.below(path) if path in self.size_bytes else []
        dropped = keys_gone(self.index.drop(key_of(path)))
        assert sorted(dropped) == sorted(key_of(other) for other in gone)
        place = {key: n for n, key in enumerate(dropped)}
        assert all(place[key_of(other)] <= place[key_of(other[:-1])] for other in gone if other != path)
        for other in gone:
            self.forget(other)

    @rule(quarters=st.sampled_from([2, 3, 1, 0, 4]))
    def evict(self, quarters: int) -> None:
        expected = []
        quota_bytes = self.index.stored_bytes * quarters // 4
        while sum(self.size_bytes.values()) > quota_bytes:
            pinned = {path for paths in self.pins.values() for path in paths}
            tips = [path for path in self.size_bytes if self.below(path) == [path] and path not in pinned]
            if not tips:
                break
            victim = min(tips, key=lambda path: self.last_use[path])
            expected.append(key_of(victim))
            self.forget(victim)
        assert keys_gone(self.index.evict(quota_bytes)) == expected

    @invariant()
    def agree(self) -> None:
        self.index.audit()
        assert self.index.blocks == len(self.size_bytes)
        assert self.index.stored_bytes == sum(self.size_bytes.values())
        statistics = self.index.statistics()
        assert statistics.pinned_blocks == len({path for paths in self.pins.values() for path in paths})
        assert statistics.pin_owners == len(self.pins)


TestIndexAgainstModel = IndexAgainstModel.TestCase
TestIndexAgainstModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None, derandomize=True)


def index_of(*paths: Path, n_bytes: int = 10) -> PrefixIndex:
    index = PrefixIndex()
    for path in paths:
        for prefix in prefixes(path):
            index.publish(key_of(path[:1]), key_of(prefix), key_of(prefix[:-1]), n_bytes)
    return index


def test_the_least_recently_used_tip_goes_first_and_the_trunk_last() -> None:
    index = index_of((0, 1, 1), (0, 1, 2), (1, 5))
    index.match(keys_of((0, 1, 1)))
    assert keys_gone(index.evict(quota_bytes=20)) == [key_of((0, 1, 2)), key_of((1, 5))]
    assert index.match(keys_of((0, 1, 1))) == 2
    assert keys_gone(index.evict(quota_bytes=0)) == [key_of((0, 1, 1)), key_of((0, 1))]
    assert index.stored_bytes == 0 and index.blocks == 0
    index.audit()


def test_a_trunk_is_as_recent_as_the_child_that_left_it() -> None:
    index = index_of((0, 1), (1, 5), (0, 1, 2))
    index.drop(key_of((0, 1, 2)))
    assert keys_gone(index.evict(quota_bytes=0)) == [key_of((1, 5)), key_of((0, 1))]


def test_a_drop_takes_the_subtree_descendants_first() -> None:
    index = index_of((0, 1, 2, 3), (0, 1, 4), (0, 5))
    assert keys_gone(index.drop(key_of((0, 1)))) == [
        key_of(path) for path in ((0, 1, 2, 3), (0, 1, 4), (0, 1, 2), (0, 1))
    ]
    assert keys_gone(index.drop(key_of((0, 1)))) == []
    assert index.match(keys_of((0, 1, 2, 3))) == 0 and index.match(keys_of((0, 5))) == 1
    index.audit()


def test_pinned_blocks_and_their_trunk_outlive_any_quota() -> None:
    index = index_of((0, 1, 2, 3))
    index.pin(7, keys_of((0, 1, 2)))
    index.pin(8, keys_of((0, 1)))
    assert keys_gone(index.evict(0)) == [key_of((0, 1, 2, 3))]
    assert index.unpin(7) == 2
    assert keys_gone(index.evict(0)) == [key_of((0, 1, 2))]
    assert index.unpin(8) == 1 and index.unpin(8) == 0
    assert keys_gone(index.evict(0)) == [key_of((0, 1))]


def test_a_block_published_again_is_free_of_old_pins() -> None:
    index = index_of((0, 1))
    index.pin(7, keys_of((0, 1)))
    index.drop(key_of((0, 1)))
    assert index.publish(key_of((0,)), key_of((0, 1)), key_of((0,)), 10)
    assert keys_gone(index.evict(0)) == [key_of((0, 1))]
    assert index.publish(key_of((0,)), key_of((0, 1)), key_of((0,)), 10)
    assert index.unpin(7) == 1
    index.audit()


def test_the_heap_stays_bounded_without_evictions() -> None:
    index = index_of((0, 1), (0, 2))
    for _ in range(1000):
        index.publish(key_of((0,)), key_of((0, 3)), key_of((0,)), 1)
        index.drop(key_of((0, 3)))
    index.audit()
    assert keys_gone(index.evict(0)) == [key_of((0, 1)), key_of((0, 2))]


def test_audit_notices_what_is_wrong() -> None:
    index = index_of((0, 1, 2))
    index._stored_bytes += 1
    with pytest.raises(AssertionError, match="bytes add up"):
        index.audit()
    index = index_of((0, 1, 2))
    index._nodes[key_of((0, 1))].children.clear()
    with pytest.raises(AssertionError, match="hangs from a root"):
        index.audit()
    index = index_of((0, 1, 2))
    index._tips.clear()
    index._nodes[key_of((0, 1, 2))].queued = False
    with pytest.raises(AssertionError, match="waits for eviction"):
        index.audit()


def test_statistics_count_hits_and_departures() -> None:
    index = index_of((0, 1, 2))
    index.match(keys_of((0, 1, 2, 3)))
    index.evict(10)
    index.drop(key_of((0, 1)))
    statistics = index.statistics()
    assert (statistics.matches, statistics.asked_blocks, statistics.hit_blocks) == (1, 3, 2)
    assert (statistics.published_blocks, statistics.evicted_blocks, statistics.dropped_blocks) == (2, 1, 1)
    assert key_of((0, 1)) not in index


def test_wrong_keys_and_sizes_are_refused() -> None:
    index = PrefixIndex()
    with pytest.raises(ValueError, match="cannot publish"):
        index.publish(b"short", key_of((0, 1)), b"short", 1)
    with pytest.raises(ValueError, match="cannot publish"):
        index.publish(key_of((0,)), key_of((0, 1)), key_of((0,)), -1)
    with pytest.raises(ValueError, match="cannot publish"):
        index.publish(key_of((0,)), b"short", key_of((0,)), 1)
    assert not index.publish(key_of((0,)), key_of((0, 1, 2)), key_of((0, 1)), 1), "its parent is not there"
    assert index.publish(key_of((0,)), key_of((0, 1)), key_of((0,)), 1)
    assert not index.publish(key_of((1,)), key_of((0, 1, 2)), key_of((0, 1)), 1), "its parent is of another namespace"
    index.audit()


def test_a_tenant_whose_blocks_have_gone_leaves_nothing() -> None:
    index = PrefixIndex()
    for tenant in range(50_000):
        root, *keys = [(3 * tenant + n).to_bytes(16, "big") for n in range(3)]
        for parent, key in zip([root, *keys], keys, strict=False):
            assert index.publish(root, key, parent, 1)
        index.match(keys)
        index.pin(tenant, keys)
        index.unpin(tenant)
        index.drop(keys[0]) if tenant % 2 else index.evict(quota_bytes=20)
    sizes = (index._roots, index._nodes, index._pins, index._tips)
    assert max(map(len, sizes)) <= 200
    index.evict(0)
    assert index.roots == [] and index.statistics().namespaces == 0
    index.audit()
