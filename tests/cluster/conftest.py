"""Real clusters for tests: tiny seeded checkpoints, engine processes, and Transformers' own answers to compare with."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.generator import GenerateRequest
from dualpath.cluster.local import Cluster
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.topology import Topology

ARCHITECTURES = ("qwen2", "qwen3", "llama", "deepseek_v3", "deepseek_v32")
ANSWER_DEADLINE_S = 60.0


class Answer(msgspec.Struct):
    """What one request gave."""

    token_ids: list[int]
    cached_tokens: int
    finish_reason: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schemas", type=int, default=100, metavar="N", help="random JSON schemas; over 100: all models")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a tiny checkpoint of an architecture, made on first use."""
    from dualpath.model.checkpoint import make_checkpoint  # not above: it needs torch

    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("models") / architecture
            make_checkpoint(made[architecture], architecture, seed=7)
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str, list[int], int], list[int]]:
    """Greedy tokens of Transformers' own `generate` on the full prompt, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    models: dict[str, object] = {}
    answers: dict[tuple[str, tuple[int, ...], int], list[int]] = {}

    def generate(architecture: str, prompt: list[int], n: int) -> list[int]:
        known = answers.get((architecture, tuple(prompt), n))
        if known is not None:
            return known
        if architecture not in models:
            model = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32)
            model.generation_config.eos_token_id = None  # `ignore_eos`: generated like any token, not masked
            models[architecture] = model
        ids = torch.tensor([prompt])
        # A mask of ones, or `generate` takes prompt tokens that equal the pad token for padding.
        output = models[architecture].generate(  # type: ignore[attr-defined]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n
        )
        answers[architecture, tuple(prompt), n] = tokens = output[0, len(prompt) :].tolist()
        return tokens

    return generate


def cluster_config(model: Path, store: Path | str, topology: str = "1P1D", **settings: object) -> ClusterConfig:
    """A small, fast cluster: 64 MiB buffers, no fsync (these tests are not about power cuts)."""
    sizes = {"buffer_bytes": 2**26, "hbm_bytes": 2**26}
    defaults: dict[str, object] = sizes | {"dtype": "float32", "durable": False, "port": 0}
    return ClusterConfig(model=str(model), store=str(store), topology=Topology.parse(topology), **(defaults | settings))  # type: ignore[arg-type]


async def ask(
    cluster: Cluster,
    prompt: list[int],
    n: int,
    tenant: str = "",
    deadline_s: float = ANSWER_DEADLINE_S,
    **sampling: object,
) -> Answer:
    """One greedy request of exactly `n` tokens, unless told otherwise."""
    params: dict[str, object] = {"max_tokens": n, "temperature": 0.0, "ignore_eos": True} | sampling
    request = GenerateRequest(
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),
        tenant=tenant,  # type: ignore[arg-type]
    )
    answer = Answer([], 0, "")
    async with asyncio.timeout(deadline_s):
        async for step in cluster.coordinator.generate(request):
            answer.token_ids += step.token_ids
            answer.cached_tokens = step.cached_tokens
            answer.finish_reason = step.finish_reason or ""
    return answer


def gauge(cluster: Cluster, name: str) -> float:
    """Sum of a gauge over engines and labels."""
    return sum(value for key, value in cluster.coordinator.gauges().items() if key.partition("{")[0] == name)


HELD_GAUGES = (
    "dualpath_requests_live",
    "dualpath_engine_attempts",
    "dualpath_buffer_held_blocks",
    "dualpath_buffer_quarantined_blocks",
    "dualpath_store_pinned_blocks",
)


async def fresh_gauges(cluster: Cluster) -> None:
    """Wait until every engine has told its gauges as they are now: the second report from here on was made after it."""
    coordinator = cluster.coordinator
    for _ in range(2):
        before = {engine: link.gauges for engine, link in coordinator._links.by_engine.items()}
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            while any(link.gauges is before.get(engine) for engine, link in coordinator._links.by_engine.items()):
                await asyncio.sleep(0.01)


async def nothing_held(cluster: Cluster, hbm_blocks: int | None = None) -> None:
    """Wait until gauges show that no request, block or buffer page is held anywhere; fail with them if it doesn't
    come.
    """
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    while time.monotonic() < deadline:
        held = {name: gauge(cluster, name) for name in HELD_GAUGES}
        free = gauge(cluster, "dualpath_hbm_free_blocks")
        holdings = cluster.coordinator.scheduler_holdings()  # an engine says that it let go after the request ended
        if not any(held.values()) and hbm_blocks in (None, free) and holdings == ():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"still held: {held}, free hbm blocks {free}, in the scheduler {holdings}")


@asynccontextmanager
async def running(config: ClusterConfig) -> AsyncIterator[Cluster]:
    async with Cluster(config) as cluster:
        yield cluster


def in_cluster(config: ClusterConfig, work: Callable[[Cluster], Awaitable[None]]) -> None:
    """Run `work` against a cluster of its own and check that it ends with nothing held."""

    async def run() -> None:
        async with running(config) as cluster:
            await work(cluster)
            await nothing_held(cluster)

    asyncio.run(run())
