"""What is written to disks that fail: the store that somebody removes, the journal whose disk is full."""

import asyncio
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

from .conftest import ask, cluster_config, gauge, in_cluster
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
        assert cluster.coordinator.health()["status"] == "ok"

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
