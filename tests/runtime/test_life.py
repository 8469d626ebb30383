"""Restart, tenants, quota, journal: what a cluster remembers, and what it writes down."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from dualpath.core.replay import replay
from dualpath.runtime.cluster import Cluster

from .conftest import ask, cluster_config, gauge, in_cluster
from .test_token_equality import appended


def test_a_restarted_cluster_finds_its_prefixes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path, system="dualpath")
    prompt = appended(0, 300)
    answers = []

    async def work(cluster: Cluster) -> None:
        answers.append(await ask(cluster, prompt, 10))

    in_cluster(config, work)
    in_cluster(config, work)
    assert [answer.cached_tokens for answer in answers] == [0, 256]
    assert answers[0].token_ids == answers[1].token_ids


def test_tenants_share_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path)

    async def work(cluster: Cluster) -> None:
        prompt = appended(0, 300)
        hits = [(await ask(cluster, prompt, 4, tenant=tenant)).cached_tokens for tenant in ("a", "b", "a")]
        assert hits == [0, 0, 256]

    in_cluster(config, work)


def test_the_store_stays_within_its_quota(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quota_bytes = 2**20
    config = cluster_config(checkpoint("qwen3"), tmp_path / "store", store_quota_bytes=quota_bytes)

    async def work(cluster: Cluster) -> None:
        for agent in range(8):
            await ask(cluster, appended(0, 300, agent), 4)
        await cluster.coordinator.settle()
        stored = sum(path.stat().st_blocks * 512 for path in (tmp_path / "store").rglob("*.kv"))
        assert 0 < stored <= quota_bytes
        assert gauge(cluster, "dualpath_store_stored_bytes") == stored
        assert gauge(cluster, "dualpath_store_evicted_blocks_total") > 0

    in_cluster(config, work)


def test_the_journal_replays_to_the_same_commands(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The runtime's inputs, given to a scheduler of its own, lead to the very commands the runtime carried out."""
    journal = tmp_path / "journal.jsonl"
    config = cluster_config(checkpoint("qwen3"), tmp_path / "store", "1P2D", journal=str(journal))

    async def work(cluster: Cluster) -> None:
        await asyncio.gather(*(ask(cluster, appended(0, 200 + agent, agent), 20) for agent in range(6)))
        await asyncio.gather(*(ask(cluster, appended(0, 200 + agent, agent), 20) for agent in range(6)))

    in_cluster(config, work)
    report = replay(journal.read_bytes().splitlines(keepends=True))
    assert report.difference is None
    assert report.entries > 12 * 6
    assert report.commands > 12 * 4


def test_sampling_is_reproducible(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path)

    async def work(cluster: Cluster) -> None:
        prompt = appended(0, 100)
        one, two, other = [(await ask(cluster, prompt, 20, temperature=1.0, seed=seed)).token_ids for seed in (1, 1, 2)]
        assert one == two != other

    in_cluster(config, work)
