"""What becomes of a cluster on disks that fail: a store that hangs, refuses or is removed, a journal on a full disk."""

import asyncio
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.driver import SchedulerDriver, scheduler_limits
from dualpath.cluster.local import Cluster
from dualpath.core.policy import Constants, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import RequestFacts

from .conftest import ask, cluster_config, fresh_gauges, gauge, in_cluster
from .faulty_store import SCHEME, let
from .test_token_equality import appended

pytestmark = pytest.mark.slow


def test_a_store_removed_under_the_server_comes_back_by_itself(
    checkpoint: Callable[[str], Path], reference: Callable[[str, list[int], int], list[int]], tmp_path: Path
) -> None:
    """The next answer is computed, and what it stores is hit by the one after: no restart."""
    config = cluster_config(checkpoint("qwen3"), tmp_path / "store")
    prompt = appended(0, 200)

    async def work(cluster: Cluster) -> None:
        expected = await asyncio.to_thread(reference, "qwen3", prompt, 4)
        assert (await ask(cluster, prompt, 4)).token_ids == expected
        await cluster.coordinator.settle()
        shutil.rmtree(tmp_path / "store")
        for cached_tokens in (0, 192):
            again = await ask(cluster, prompt, 4)
            assert (again.token_ids, again.cached_tokens) == (expected, cached_tokens)
            await cluster.coordinator.settle()
        assert gauge(cluster, "dualpath_store_write_errors_total") == 0
        await fresh_gauges(cluster)  # what the engine said last may be of before
        assert cluster.coordinator.health()["status"] == "ok"

    in_cluster(config, work)


FAULTS = [
    ("read", "hang", "slow"),
    ("end read", "hang", "slow"),
    ("read", "refuse", "unreachable"),
    ("read", "unavailable", "ok"),
    ("write", "hang", "slow"),
    ("write", "refuse", "read-only"),
    ("find", "hang", "slow"),
    ("find", "refuse", "unreachable"),
    ("prepare", "hang", "ok"),
    ("read", "odd", "unreachable"),
    ("write", "odd", "read-only"),
    ("find", "odd", "unreachable"),
]
"""A call of the store, what becomes of it, and what /health says of the store then."""


@pytest.mark.parametrize("system", ["basic", "dualpath-split"])
def test_a_store_that_fails_costs_hits_and_nothing_else(
    checkpoint: Callable[[str], Path],
    reference: Callable[[str, list[int], int], list[int]],
    tmp_path: Path,
    system: str,
) -> None:
    """Whatever its calls do: right tokens, for new tenants too; /health says so; the hits are back when it is."""
    store = tmp_path / "store"
    config = cluster_config(checkpoint("qwen3"), f"{SCHEME}://{store}", system=system, store_timeout_s=0.5)
    prompts = [appended(turn, 200) for turn in range(2)]

    async def cached(cluster: Cluster, tenant: str = "") -> list[int]:
        """Returns the cached tokens of right answers."""
        expected = [await asyncio.to_thread(reference, "qwen3", prompt, 4) for prompt in prompts]
        answers = await asyncio.gather(*(ask(cluster, prompt, 4, tenant) for prompt in prompts))
        assert [answer.token_ids for answer in answers] == expected
        return [answer.cached_tokens for answer in answers]

    async def is_well(cluster: Cluster) -> None:
        """Everything hits again, what is new is stored and found, and /health says ok."""
        for n in itertools.count():
            await cached(cluster, f"{asyncio.get_running_loop().time()}")
            health = cluster.coordinator.health()
            if await cached(cluster) == [192, 192] and health["status"] == health["store"]["status"] == "ok":  # type: ignore[index]
                return
            assert n < 200, health
            await asyncio.sleep(0.1)

    async def says(cluster: Cluster, status: str) -> None:
        async with asyncio.timeout(20):
            while (said := cluster.coordinator.health()["store"])["status"] != status:  # type: ignore[index]
                await asyncio.sleep(0.02)
        if status != "ok":
            assert cluster.coordinator.health()["status"] == "degraded"
            assert said["since"] > 0 and said["reason"]  # type: ignore[index]

    async def work(cluster: Cluster) -> None:
        await cached(cluster)
        for n, (call, fault, status) in enumerate(FAULTS):
            await is_well(cluster)
            let(store, {call: fault})
            for tenant in ("", f"tenant {n}", ""):
                await cached(cluster, tenant)
            await says(cluster, status)
            let(store, {})
        await is_well(cluster)
        assert gauge(cluster, "dualpath_store_dropped_blocks_total") == 0
        assert gauge(cluster, "dualpath_block_io_hung") == gauge(cluster, "dualpath_store_io_hung") == 0

    in_cluster(config, work)


def test_a_journal_whose_disk_is_full_stops_the_cluster(caplog: pytest.LogCaptureFixture) -> None:
    """A journal with a gap would replay to something else: whoever asked for one is told at once."""

    async def run() -> None:
        broken: list[BaseException] = []
        driver = SchedulerDriver(broken.append, "/dev/full")
        config = ClusterConfig(model="m", store="s")
        constants = Constants.from_rates(snic_tokens_per_s=1e3, prefill_tokens_per_s=1e3)
        driver.begin(Scheduler(Policy(), constants, scheduler_limits(config)), lambda _: None)
        with pytest.raises(OSError, match="No space left"):
            for request in range(10_000):
                facts = RequestFacts(request, 0, 100, 0, 1)
                driver.input(lambda s, now, facts=facts: s.submit(now, facts))  # type: ignore[misc]
        assert [type(error) for error in broken] == [OSError]
        driver.close()  # must not raise: it is the first step of ending the cluster
        assert "the journal's end could not be written" in caplog.text

    asyncio.run(run())
