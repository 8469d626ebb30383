"""Every family of attention over the API: tokens are those of Transformers' `generate`, and blocks are read as told.

One cluster a family; its requests are told which side reads.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import pytest

from dualpath.cluster.local import Cluster
from dualpath.core import read_path
from dualpath.core.read_path import PathFacts, ReadPath
from dualpath.kv import KVLayout
from dualpath.serving.cluster_server import ClusterServer
from dualpath.spec.architectures import Architecture

from .conftest import ANSWER_DEADLINE_S, cluster_config, fresh_gauges, gauge, nothing_held
from .test_token_equality import appended

pytestmark = pytest.mark.slow

Reference = Callable[[str, list[int], int], list[int]]
PLAIN = {"qwen2", "qwen3", "llama", "deepseek_v3"}
"""Those with plain attention are in `test_token_equality`."""
FAMILIES = tuple(family for family in get_args(Architecture) if family not in PLAIN)
"""Windows of 50 tokens, or the 64 tokens that an indexer selects: neither more than a short prompt nor whole blocks."""
KILLED = ("deepseek_v32", "gpt_oss")
BASE = appended(0, 260)
HIT_BLOCKS = 4
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


class Told:
    """Stands in for the rule of `dualpath-split`: the next requests' hits are read as `side` says."""

    side = "PE"

    def __call__(self, facts: PathFacts) -> int:
        return {"PE": facts.hit_blocks, "DE": 0, "both": facts.hit_blocks // 2}[self.side]


class Api:
    """Asks for completions, and checks them."""

    def __init__(self, served: ClusterServer, architecture: str, reference: Reference) -> None:
        self.served, self.architecture, self._reference = served, architecture, reference
        self.http = httpx.AsyncClient(base_url=served.url, timeout=ANSWER_DEADLINE_S)

    @property
    def cluster(self) -> Cluster:
        return self.served.cluster

    async def expect(self, prompt: list[int], n: int, hit_blocks: int) -> None:
        body = {"prompt": prompt, "max_tokens": n} | GREEDY
        answer = await self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 64 * hit_blocks
        assert told["choices"][0]["token_ids"] == await self.tokens(prompt, n)

    async def tokens(self, prompt: list[int], n: int) -> list[int]:
        return await asyncio.to_thread(self._reference, self.architecture, prompt, n)

    async def stream(self, prompt: list[int], n: int) -> AsyncIterator[list[int]]:
        body = {"prompt": prompt, "max_tokens": n, "stream": True} | GREEDY
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    for choice in msgspec.json.decode(line.removeprefix("data: "))["choices"]:
                        yield choice["token_ids"]


@asynccontextmanager
async def serving(config: Any, architecture: str, reference: Reference) -> AsyncIterator[Api]:
    async with ClusterServer(config) as served:
        api = Api(served, architecture, reference)
        async with api.http:
            yield api
            await nothing_held(served.cluster)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tokens_over_the_api(
    checkpoint: Callable[[str], Path],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
) -> None:
    told = Told()
    monkeypatch.setitem(read_path.READ_PATHS._known, "split", ReadPath(told))
    config = cluster_config(checkpoint(architecture), tmp_path, system="dualpath-split", max_batch_tokens=100)

    async def run() -> None:
        async with serving(config, architecture, reference) as api:
            await api.expect(BASE, 10, hit_blocks=0)  # in chunks
            await api.expect(appended(1, 30), 8, hit_blocks=0)  # shorter than the window, and than a block
            for turn, side in enumerate(("PE", "DE", "both")):
                told.side = side
                await one_path(api, turn, side)
            await packed(api)
            if architecture in KILLED:
                await an_engine_is_killed(api)

    asyncio.run(run())


@pytest.mark.parametrize("architecture", KILLED)
def test_whole_prompts_over_tcp(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, architecture: str
) -> None:
    """All layers are loaded before any is computed; what layers don't see is not there."""
    config = cluster_config(checkpoint(architecture), tmp_path, system="basic", transport="tcp")

    async def run() -> None:
        async with serving(config, architecture, reference) as api:
            await api.expect(BASE, 10, hit_blocks=0)
            await one_path(api, 0, "PE")

    asyncio.run(run())


async def one_path(api: Api, turn: int, side: str) -> None:
    """A hit of whole blocks, read by the side that was told, and no byte more than its layers see."""
    before = await figures(api.cluster)
    await api.expect(BASE + appended(10 + turn, 37), 12, HIT_BLOCKS)
    after = await figures(api.cluster)
    of_pe = {"PE": HIT_BLOCKS, "DE": 0, "both": HIT_BLOCKS // 2}[side]
    layout = api.cluster.coordinator.layout
    expected = {
        "PE blocks": of_pe,
        "DE blocks": HIT_BLOCKS - of_pe,
        "PE bytes": read_bytes(layout, range(of_pe), HIT_BLOCKS),
        "DE bytes": read_bytes(layout, range(of_pe, HIT_BLOCKS), HIT_BLOCKS),
    }
    assert {name: after[name] - before[name] for name in after} == expected
    assert expected["PE bytes"] + expected["DE bytes"] == layout.kv_bytes.hit_bytes(HIT_BLOCKS * 64)


def read_bytes(layout: KVLayout, blocks: range, hit_blocks: int) -> int:
    """What is read of some blocks of a hit: of each the layers that see it from the hit's end on."""
    hit_tokens = hit_blocks * layout.block_tokens
    return sum(layout.layer_block_bytes[layer] for block in blocks for layer in layout.layers_seen(block, hit_tokens))


async def figures(cluster: Cluster) -> dict[str, float]:
    await fresh_gauges(cluster)
    shown = cluster.coordinator.gauges()

    def snic(role: str) -> float:
        parts = (f'role="{role}"', 'nic="snic",direction="rx"')
        return sum(n for name, n in shown.items() if "_nic_bytes_" in name and all(part in name for part in parts))

    return {
        "PE blocks": gauge(cluster, "dualpath_scheduler_pe_read_blocks_total"),
        "DE blocks": gauge(cluster, "dualpath_scheduler_de_read_blocks_total"),
        "PE bytes": snic("prefill"),
        "DE bytes": snic("decode"),
    }


async def packed(api: Api) -> None:
    """Six at once: passes hold chunks of several, with hits of different lengths and without."""
    prompts = [(BASE[:cut] + appended(20 + cut, 90), cut // 64) for cut in (260, 200, 130, 64, 63, 0)]
    await asyncio.gather(*(api.expect(prompt, 10, hit_blocks) for prompt, hit_blocks in prompts))
    await fresh_gauges(api.cluster)
    chunks, batches = (gauge(api.cluster, f"dualpath_prefill_{what}_total") for what in ("chunks", "batches"))
    assert chunks > batches


async def an_engine_is_killed(api: Api) -> None:
    """The only DE, amid an answer: another takes its place, and what was generated is not generated again."""
    prompt, n = BASE + appended(30, 60), 80
    tokens: list[int] = []
    async for piece in api.stream(prompt, n):
        if not tokens:
            engines: Any = api.cluster.coordinator.health()["engines"]
            os.kill(next(engine["pid"] for engine in engines if engine["role"] == "decode"), signal.SIGKILL)
        tokens += piece
    assert tokens == await api.tokens(prompt, n)
    assert api.cluster.coordinator.gauges()['dualpath_scheduler_retried_total{cause="engine_lost"}'] > 0
