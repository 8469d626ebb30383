"""Multi-turn greedy output equals Transformers' own `generate`, on every path, with the loaded blocks as they should
be.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster.local import Cluster

from .conftest import ARCHITECTURES, ask, cluster_config, fresh_gauges, gauge, in_cluster

Reference = Callable[[str, list[int], int], list[int]]
TURNS = ((600, 20), (70, 33), (5, 40))
"""Appended and generated tokens of each turn: block boundaries fall inside prompts, appends and generations."""


def appended(turn: int, tokens: int, agent: int = 0) -> list[int]:
    return [random.Random(f"{agent}/{turn}").randrange(10, 250) for _ in range(tokens)]


async def converse(
    cluster: Cluster, architecture: str, reference: Reference, cached: bool, agent: int = 0
) -> list[int]:
    """One agent's turns, each checked against the reference; returns the hit tokens of each."""
    context: list[int] = []
    stored_tokens, hits = 0, []
    for turn, (append, n) in enumerate(TURNS):
        context += appended(turn, append, agent)
        answer = await ask(cluster, context, n)
        expected_ids = await asyncio.to_thread(reference, architecture, context, n)
        assert answer.token_ids == expected_ids, f"turn {turn}"
        assert answer.finish_reason == "length"
        expected = min(stored_tokens, len(context) - 1) // 64 * 64 if cached else 0
        assert answer.cached_tokens == expected
        hits.append(answer.cached_tokens)
        context += answer.token_ids
        stored_tokens = len(context) - 1  # the KV of the last token was never computed
    return hits


PATHS = {
    "pe-path": {"system": "basic-layerwise"},
    "pe-path-whole-prompt": {"system": "basic"},
    "de-path": {"system": "de-only"},
    "both-sides": {"system": "dualpath-split"},
    "cache-off": {"system": "dualpath", "prefix_cache": False},
    "chunked": {"system": "dualpath-split", "max_batch_tokens": 37},
    "tcp": {"system": "dualpath-split", "transport": "tcp"},
    "nixl": {"system": "dualpath-split", "transport": "nixl"},
    "cnic": {"system": "dualpath-split", "device_copies": "cnic"},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_path_gives_the_reference_tokens(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, architecture: str, path: str
) -> None:
    config = cluster_config(checkpoint(architecture), tmp_path, **PATHS[path])

    async def work(cluster: Cluster) -> None:
        cached = config.prefix_cache
        hits = await converse(cluster, architecture, reference, cached)
        await fresh_gauges(cluster)
        block_bytes = gauge_block_bytes(cluster)
        read = {role: snic_read_blocks(cluster, role, block_bytes) for role in ("prefill", "decode")}
        hit_blocks = sum(hits) // 64
        if path.startswith("pe-path"):
            assert read == {"prefill": hit_blocks, "decode": 0}
        elif path == "de-path":
            assert read == {"prefill": 0, "decode": hit_blocks}
        elif path == "cache-off":
            assert read == {"prefill": 0, "decode": 0}
        else:
            assert read["prefill"] + read["decode"] == hit_blocks
            assert min(read.values()) > 0
        if path == "chunked":
            assert gauge(cluster, "dualpath_prefill_chunks_total") > len(TURNS)

    in_cluster(config, work)


def gauge_block_bytes(cluster: Cluster) -> int:
    return cluster.coordinator.layout.full_block_bytes


def snic_read_blocks(cluster: Cluster, role: str, block_bytes: int) -> float:
    figures = cluster.coordinator.gauges()
    return (
        sum(
            value
            for name, value in figures.items()
            if name.startswith("dualpath_nic_bytes_total")
            and f'role="{role}"' in name
            and 'nic="snic",direction="rx"' in name
        )
        / block_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3", "deepseek_v32", "gpt_oss"])
def test_agents_packed_in_one_batch(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, architecture: str
) -> None:
    """Six agents at once on 1P2D: prefill batches hold several of them, decode batches too."""
    config = cluster_config(checkpoint(architecture), tmp_path, "1P2D", system="dualpath")

    async def work(cluster: Cluster) -> None:
        await asyncio.gather(*(converse(cluster, architecture, reference, True, agent) for agent in range(6)))
        await fresh_gauges(cluster)
        assert gauge(cluster, "dualpath_prefill_chunks_total") > gauge(cluster, "dualpath_prefill_batches_total")
        assert gauge(cluster, "dualpath_decode_tokens_total") > gauge(cluster, "dualpath_decode_steps_total")

    in_cluster(config, work)
