"""Two live clusters on one store, and a store that is emptied under them."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster.local import Cluster

from .conftest import Answer, ask, cluster_config, gauge, in_cluster, nothing_held, running
from .test_token_equality import appended

pytestmark = pytest.mark.slow


def test_clusters_on_one_store_hit_each_others_blocks(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Both are up before anything is written. One evicts what the other's index names: a miss there, no more."""
    store = tmp_path / "store"
    config = cluster_config(checkpoint("qwen3"), store)

    async def work() -> None:
        async with running(config) as one, running(config) as other:
            prompt = appended(0, 300)
            first = await ask(one, prompt, 10)
            again = await ask(other, prompt, 10)
            assert (first.cached_tokens, again.cached_tokens) == (0, 256)
            assert gauge(other, "dualpath_store_found_blocks_total") == 4
            longer = prompt + first.token_ids + appended(1, 200)
            second = await ask(other, longer, 10)
            assert second.cached_tokens == 256
            back = await ask(one, longer, 10)
            assert back.cached_tokens == 448, "and back"
            assert (again.token_ids, back.token_ids) == (first.token_ids, second.token_ids)

            prefixes = other.coordinator._founded.requests.prefixes
            prefixes._quota_bytes = 0
            prefixes._enforce_quota()
            await other.coordinator.settle()
            assert list(store.rglob("*.kv")) == []
            prefixes._quota_bytes = None
            assert await ask(one, longer, 10) == Answer(back.token_ids, 0, "length")
            assert (await ask(one, longer, 10)).cached_tokens == 448
            for cluster in (one, other):
                await nothing_held(cluster)

    asyncio.run(work())


@pytest.mark.parametrize("removed", ["*/??", "*", "."])
def test_a_store_emptied_under_a_live_cluster(checkpoint: Callable[[str], Path], tmp_path: Path, removed: str) -> None:
    """``rm -rf STORE/*/??``, ``STORE/*``, ``STORE``: right answers from misses, then hits again."""
    store = tmp_path / "store"

    async def work(cluster: Cluster) -> None:
        prompt = appended(0, 300)
        first = await ask(cluster, prompt, 10)
        assert (await ask(cluster, prompt, 10)).cached_tokens == 256
        for path in [store] if removed == "." else list(store.glob(removed)):
            shutil.rmtree(path)
        assert await ask(cluster, prompt, 10) == Answer(first.token_ids, 0, "length")
        assert await ask(cluster, prompt, 10) == Answer(first.token_ids, 256, "length")
        await asyncio.sleep(2 * cluster.config.heartbeat_ns / 1e9)
        assert gauge(cluster, "dualpath_store_write_errors_total") == 0
        assert gauge(cluster, "dualpath_store_file_errors_total") == 0

    in_cluster(cluster_config(checkpoint("qwen3"), store), work)
