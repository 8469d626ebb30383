"""Restart, tenants, quota, journal: what a cluster remembers, and what it writes down."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster.generator import GenerateRequest
from dualpath.cluster.local import Cluster
from dualpath.core.journal import replay
from dualpath.spec.sampling import SamplingParams

from .conftest import ask, cluster_config, fresh_gauges, gauge, in_cluster, nothing_held
from .test_token_equality import appended

pytestmark = pytest.mark.slow


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


def test_the_next_turn_hits_all_that_was_computed(
    checkpoint: Callable[[str], Path], reference: Callable[[str, list[int], int], list[int]], tmp_path: Path
) -> None:
    """Whatever the lengths: short prompts, exact multiples of a block, more than two blocks generated in one turn."""
    config = cluster_config(checkpoint("qwen3"), tmp_path, system="dualpath")

    async def work(cluster: Cluster) -> None:
        for agent, (prompt_tokens, generated_tokens) in enumerate([(1, 1), (63, 2), (64, 1), (65, 140), (128, 65)]):
            context = appended(0, prompt_tokens, agent)
            first = await ask(cluster, context, generated_tokens)
            assert first.cached_tokens == 0
            assert first.token_ids == await asyncio.to_thread(reference, "qwen3", context, generated_tokens)
            same = await ask(cluster, context, generated_tokens)
            assert same.token_ids == first.token_ids
            assert same.cached_tokens == (prompt_tokens - 1) // 64 * 64  # at least one token is computed
            context += first.token_ids
            stored_blocks = (len(context) - 1) // 64
            context += appended(1, 70, agent)
            assert (await ask(cluster, context, 2)).cached_tokens == stored_blocks * 64

    in_cluster(config, work)


def test_a_client_that_stops_reading_still_finds_its_prompt(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As the server does at a stop string: it closes the stream after a few tokens."""
    config = cluster_config(checkpoint("qwen3"), tmp_path)
    prompt = appended(0, 200)

    async def work(cluster: Cluster) -> None:
        sampling = SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
        stream = cluster.coordinator.generate(GenerateRequest(prompt_token_ids=prompt, sampling=sampling))
        for _ in range(3):
            await anext(stream)
        await stream.aclose()
        await nothing_held(cluster)
        assert (await ask(cluster, prompt, 4)).cached_tokens == 192

    in_cluster(config, work)


def test_storage_that_fills_up_does_not_stop_serving(
    checkpoint: Callable[[str], Path], reference: Callable[[str, list[int], int], list[int]], tmp_path: Path
) -> None:
    """Every shard of the namespace becomes unwritable: right answers, nothing stored, and counters that say so."""
    config = cluster_config(checkpoint("qwen3"), tmp_path)

    async def work(cluster: Cluster) -> None:
        await ask(cluster, appended(0, 70), 1)
        (space,) = (path for path in tmp_path.iterdir() if path.is_dir())
        for shard in range(256):
            if not (space / f"{shard:02x}").exists():
                (space / f"{shard:02x}").symlink_to("/sys")  # a folder in which nobody can make a file
        prompt = appended(1, 200)
        for _ in range(2):
            answer = await ask(cluster, prompt, 4)
            assert answer.token_ids == await asyncio.to_thread(reference, "qwen3", prompt, 4)
            assert answer.cached_tokens == 0
        await fresh_gauges(cluster)
        assert gauge(cluster, "dualpath_store_write_errors_total") == 2
        health = cluster.coordinator.health()
        assert (health["status"], health["store"]["status"]) == ("degraded", "read-only")  # type: ignore[index]

    in_cluster(config, work)
