"""What goes wrong, goes wrong visibly, harms nobody else and leaves nothing held."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster.generator import GenerateRequest, RequestError
from dualpath.cluster.local import Cluster
from dualpath.core.journal import replay
from dualpath.spec.sampling import SamplingParams

from .conftest import ask, cluster_config, gauge, in_cluster
from .test_token_equality import appended

pytestmark = pytest.mark.slow

Reference = Callable[[str, list[int], int], list[int]]
TOKENS = 100
HEARTBEAT_NS = 50_000_000
"""An engine at work must be seen in its gauges, which come with heartbeats, well before it has generated so much."""


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {"checksum": flip_a_bit, "truncated": truncate, "missing": Path.unlink}


@pytest.mark.parametrize("system", ["basic-layerwise", "de-only"])
@pytest.mark.parametrize("cause", DAMAGE)
def test_a_damaged_block_is_recomputed_and_never_served_again(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, cause: str, system: str
) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path, system=system)
    prompt = appended(0, 400)

    async def work(cluster: Cluster) -> None:
        first = await ask(cluster, prompt, 8)
        await cluster.coordinator.settle()
        victim = block_file(cluster, tmp_path, prompt, block=3)
        DAMAGE[cause](victim)
        again = await ask(cluster, prompt, 8)
        assert again.token_ids == first.token_ids == reference("qwen3", prompt, 8)
        assert again.cached_tokens == 3 * 64  # what lay before the damaged block was still used
        assert cluster.coordinator.gauges()[f'dualpath_store_faults_total{{cause="{cause}"}}'] == 1
        third = await ask(cluster, prompt, 8)
        assert third.cached_tokens == 6 * 64  # recomputed, stored anew and read without a fault
        assert third.token_ids == first.token_ids
        assert cluster.coordinator.gauges()[f'dualpath_store_faults_total{{cause="{cause}"}}'] == 1

    in_cluster(config, work)


def block_file(cluster: Cluster, store: Path, prompt: list[int], block: int) -> Path:
    key = cluster.coordinator.block_key(prompt, block)
    (path,) = store.rglob(f"{key.hex()}*")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "nixl"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_kill_9_under_load(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, role: str, transport: str
) -> None:
    """One of two engines of a role dies at work: every client gets exactly the right tokens, and nothing stays held."""
    config = cluster_config(
        checkpoint("qwen3"),
        tmp_path,
        "2P2D",
        system="dualpath",
        transport=transport,
        cnic_bytes_per_s=4_000_000,
        lease_ns=2_000_000_000,
        heartbeat_ns=HEARTBEAT_NS,
    )
    prompts = [appended(0, 300 + 10 * agent, agent) for agent in range(8)]

    async def work(cluster: Cluster) -> None:
        asked = [asyncio.create_task(ask(cluster, prompt, TOKENS)) for prompt in prompts]
        busy = "dualpath_engine_attempts" if role == "prefill" else "dualpath_decode_running_requests"
        victim = await busy_engine(cluster, role, busy)
        os.kill(victim, signal.SIGKILL)
        answers = await asyncio.gather(*asked)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == await asyncio.to_thread(reference, "qwen3", prompt, TOKENS)
        assert gauge(cluster, "dualpath_lost_engines_total") == 1
        async with asyncio.timeout(60.0):
            while cluster.coordinator.health()["status"] != "ok":  # another takes its place
                await asyncio.sleep(0.05)
        assert gauge(cluster, "dualpath_restarted_parts_total") == 1
        assert cluster.coordinator.gauges()['dualpath_scheduler_retried_total{cause="engine_lost"}'] > 0

    in_cluster(config, work)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp", "nixl"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_that_hangs_under_load(
    checkpoint: Callable[[str], Path], reference: Reference, tmp_path: Path, role: str, transport: str
) -> None:
    """Stopped, not dead: its lease runs out, it is killed, and every client gets exactly the right tokens."""
    journal = tmp_path / "journal.jsonl"
    config = cluster_config(
        checkpoint("qwen3"),
        tmp_path / "store",
        "2P2D",
        cnic_bytes_per_s=4_000_000,
        lease_ns=1_500_000_000,
        heartbeat_ns=HEARTBEAT_NS,
        transport=transport,
        journal=str(journal),
    )
    prompts = [appended(0, 300 + 10 * agent, agent) for agent in range(6)]

    async def work(cluster: Cluster) -> None:
        asked = [asyncio.create_task(ask(cluster, prompt, TOKENS)) for prompt in prompts]
        busy = "dualpath_engine_attempts" if role == "prefill" else "dualpath_decode_running_requests"
        victim = await busy_engine(cluster, role, busy)
        os.kill(victim, signal.SIGSTOP)
        answers = await asyncio.gather(*asked)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == await asyncio.to_thread(reference, "qwen3", prompt, TOKENS)
        assert victim not in cluster.supervisor.pids
        assert cluster.coordinator.gauges()['dualpath_scheduler_retried_total{cause="engine_lost"}'] > 0

    in_cluster(config, work)
    assert replay(journal.read_bytes().splitlines(keepends=True)).difference is None


def test_a_coordinator_that_was_held_up_loses_nobody(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Its event loop stands still for longer than a lease: engines are not to blame."""
    config = cluster_config(checkpoint("qwen3"), tmp_path, lease_ns=1_000_000_000)

    async def work(cluster: Cluster) -> None:
        asked = asyncio.create_task(ask(cluster, appended(0, 300), 200))
        await asyncio.sleep(0.1)
        time.sleep(1.5)
        assert len((await asked).token_ids) == 200
        assert cluster.coordinator.health()["status"] == "ok"

    in_cluster(config, work)


async def busy_engine(cluster: Cluster, role: str, busy: str) -> int:
    """The pid of an engine of that role that has work right now."""
    for _ in range(200):
        for name, value in cluster.coordinator.gauges().items():
            if name.startswith(busy) and f'role="{role}"' in name and value > 0:
                engine = int(name.partition('engine="')[2].partition('"')[0])
                engines: list[dict[str, int]] = cluster.coordinator.health()["engines"]  # type: ignore[assignment]
                return next(entry["pid"] for entry in engines if entry["engine"] == engine)
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {role} engine became busy")


def test_the_last_engine_of_a_role_dies(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Where nobody is to wait for another, requests end with a clear 503 at once, the ones under way too."""
    config = cluster_config(checkpoint("qwen3"), tmp_path, cnic_bytes_per_s=300_000, replacement_timeout_s=0.0)

    async def work(cluster: Cluster) -> None:
        waiting = asyncio.create_task(ask(cluster, appended(0, 300), 8))
        os.kill(await busy_engine(cluster, "prefill", "dualpath_engine_attempts"), signal.SIGKILL)
        for request in (waiting, asyncio.create_task(ask(cluster, appended(1, 300), 8))):
            with pytest.raises(RequestError) as failure:
                await request
                raise AssertionError("a request succeeded without a prefill engine")
            assert failure.value.status == 503
            assert failure.value.code == "no_engine"
        assert cluster.coordinator.health()["status"] == "unavailable"

    in_cluster(config, work)


@pytest.mark.parametrize("after_tokens", [0, 1, 5])
def test_a_client_that_leaves_frees_everything(
    checkpoint: Callable[[str], Path], tmp_path: Path, after_tokens: int
) -> None:
    """Leaving before the first token (while KV moves slowly), right after it, and in the middle of decoding."""
    config = cluster_config(checkpoint("qwen3"), tmp_path, cnic_bytes_per_s=3_000_000)

    async def work(cluster: Cluster) -> None:
        sampling = SamplingParams(max_tokens=3000, temperature=0.0, ignore_eos=True)
        stream = cluster.coordinator.generate(GenerateRequest(prompt_token_ids=appended(0, 500), sampling=sampling))
        seen = asyncio.create_task(anext(stream))
        if after_tokens:
            await seen
            for _ in range(after_tokens - 1):
                await anext(stream)
        else:
            await busy_engine(cluster, "prefill", "dualpath_engine_attempts")
            seen.cancel()
            await asyncio.gather(seen, return_exceptions=True)
        await stream.aclose()

    in_cluster(config, work)


def test_admission_is_bounded(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Beyond `max_waiting` a client is told to come back, and those admitted are served."""
    config = cluster_config(checkpoint("qwen3"), tmp_path, max_waiting=4, hbm_bytes=2**20, cnic_bytes_per_s=20_000_000)

    async def work(cluster: Cluster) -> None:
        asked = [asyncio.create_task(ask(cluster, appended(0, 200, agent), 4)) for agent in range(40)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        served = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(refused) + len(served) == 40
        assert refused
        assert all(error.status == 429 and error.retry_after_s for error in refused)
        assert len(served) >= 4

    in_cluster(config, work)


def test_what_can_never_fit_is_refused_at_once(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = cluster_config(checkpoint("qwen3"), tmp_path, hbm_bytes=2**20)

    async def work(cluster: Cluster) -> None:
        with pytest.raises(RequestError, match="fits no engine") as failure:
            await ask(cluster, appended(0, 3_000), 4)
        assert failure.value.status == 400

    in_cluster(config, work)
