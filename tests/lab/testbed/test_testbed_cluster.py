"""Real clusters inside a testbed: coordinator, engines, object server, each in its namespace."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from bed import SUBNET

from dualpath.lab.experiments.local_cluster import LaunchError
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.launcher import TestbedLauncher
from dualpath.lab.testbed.network import Testbed, leftovers, load, status
from dualpath.lab.testbed.object_server import missing_parts
from dualpath.lab.testbed.plan import Rates
from dualpath.lab.testbed.temporary import temporary_testbed
from dualpath.model.checkpoint import make_checkpoint

pytestmark = pytest.mark.privileged
MEMORY = ("--buffer", "64MiB", "--hbm", "64MiB")
PROMPT = "an agent's context, long enough for some blocks. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = missing_parts()
    if missing is not None:
        pytest.skip(missing)
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3", seed=7)


@pytest.fixture
def launcher(testbed: Testbed, model: Path, tmp_path: Path) -> TestbedLauncher:
    return TestbedLauncher(
        testbed, model=model, rates=Rates(4_000_000, 20_000_000), logs=tmp_path, work=tmp_path / "work", options=MEMORY
    )


def sent_bytes(testbed: Testbed) -> dict[str, int]:
    """By node and NIC, where there is a rate."""
    return {
        f"{node.name} {device.name}": device.sent_low_bytes
        for node in status(testbed)
        for device in node.devices
        if device.sent_low_bytes is not None
    }


async def complete(url: str) -> int:
    """Hit tokens of a completion."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "ignore_eos": True}
        answer = await client.post(f"{url}/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text
        hit: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return hit


async def counted_bytes(url: str, role: str, nic: str, direction: str) -> int:
    """What the engines of a role say of their NICs, once they have said it: gauges come with heartbeats."""
    await asyncio.sleep(1.0)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        text = (await client.get(f"{url}/metrics")).text
    labels = (f'role="{role}"', f'nic="{nic}"', f'direction="{direction}"')
    lines = [line for line in text.splitlines() if line.startswith("dualpath_nic_bytes_total")]
    return sum(int(float(line.split()[-1])) for line in lines if all(label in line for label in labels))


@pytest.mark.slow
def test_a_cluster_reads_what_another_has_stored(launcher: TestbedLauncher, tmp_path: Path) -> None:
    """KV goes out through the DE's SNIC, and comes back through an SNIC after a restart; nothing stays behind."""
    store = tmp_path / "store"

    async def first() -> None:
        async with launcher.cluster("first", "1P2D", "dualpath", store, limited=True) as cluster:
            assert await cluster.run(complete(cluster.url)) == 0
            while len(list(store.rglob("*.kv"))) < len(PROMPT) // 64:
                await asyncio.sleep(0.02)
            written = await cluster.run(counted_bytes(cluster.url, "decode", "snic", "tx"))
            sent = sent_bytes(launcher.testbed)
            assert 0 < written < sent["de0 snic0"] + sent["de1 snic0"], "all of it went over the storage network"

    async def second() -> None:
        async with launcher.cluster("second", "1P1D", "basic", store, limited=True) as cluster:
            before = sent_bytes(launcher.testbed)
            assert await cluster.run(complete(cluster.url)) >= 64
            after = sent_bytes(launcher.testbed)
            assert after["pe0 cnic0"] - before["pe0 cnic0"] > 64 * 1024, "KV of the prompt, over the compute network"
            read = await cluster.run(counted_bytes(cluster.url, "prefill", "snic", "rx"))
            received = network.sent_bytes_by_class(launcher.testbed.plan.switch, "s.pe0")["1:1"]
            assert 0 < read < received
            assert all(node.pids for node in status(launcher.testbed) if node.name != "de1")

    asyncio.run(asyncio.wait_for(first(), 200))
    assert not any(node.pids for node in status(launcher.testbed))
    asyncio.run(asyncio.wait_for(second(), 200))
    assert not any(node.pids for node in status(launcher.testbed))


@pytest.mark.slow
def test_an_engine_that_dies_ends_the_cluster(launcher: TestbedLauncher, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with launcher.cluster("frail", "1P1D", "dualpath", tmp_path / "store", limited=False) as cluster:
            assert all(device.rate_bytes_per_s is None for node in status(load_again()) for device in node.devices)
            first, *children = sorted(iproute.pids(launcher.testbed.plan.node("de0").namespace))
            assert children  # its agent and its engine, which end with it
            os.kill(first, signal.SIGKILL)
            await cluster.run(asyncio.sleep(60))

    def load_again() -> Testbed:
        return load(launcher.testbed.plan.name)

    with pytest.raises(LaunchError, match="frail: engine de0 ended by itself, exit code -9"):
        asyncio.run(asyncio.wait_for(scenario(), 200))
    assert not any(node.pids for node in status(launcher.testbed))


@pytest.mark.slow
def test_an_engine_that_can_not_start_is_told_at_once(launcher: TestbedLauncher, tmp_path: Path) -> None:
    launcher.options = (*MEMORY, "--device", "nowhere")

    async def scenario() -> None:
        async with launcher.cluster("broken", "1P1D", "dualpath", tmp_path / "store", limited=True):
            pytest.fail("there is no such device")

    with pytest.raises(LaunchError, match=r"(?s)broken.*exit code [12].*The end of .*nowhere"):
        asyncio.run(asyncio.wait_for(scenario(), 120))
    assert not any(node.pids for node in status(launcher.testbed))


def test_more_engines_than_the_testbed_has(launcher: TestbedLauncher, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="the testbed has no pe1, which 2P1D needs"):
        launcher.cluster("large", "2P1D", "dualpath", tmp_path / "store", limited=True)


def test_a_temporary_testbed_is_as_large_as_any_topology_needs(testbed_name: str) -> None:
    with temporary_testbed(["2P1D", "1P3D"], Rates(snic=1_000_000), testbed_name, SUBNET):
        plan = load(testbed_name).plan
        assert (plan.prefill_engines, plan.decode_engines) == (2, 3)
    assert leftovers(testbed_name) == []
    with pytest.raises(RuntimeError, match="inside"), temporary_testbed(["1P1D"], Rates(), testbed_name, SUBNET):
        raise RuntimeError("inside")
    assert leftovers(testbed_name) == []


@pytest.mark.slow
def test_run_serves_until_a_command_has_ended(testbed: Testbed, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dualpath", "testbed", "run", "--name", testbed.plan.name, "--model", model]
    command += ["--store", tmp_path / "store", "--topology", "1P1D", "--logs", tmp_path, *MEMORY]
    then = "import os, httpx, sys; sys.exit(httpx.get(os.environ['DUALPATH_URL'] + '/health').status_code // 50)"
    done = subprocess.run([*command, "--", sys.executable, "-c", then], capture_output=True, text=True, timeout=200)
    assert done.returncode == 4, done.stderr
    assert "serves at http://" in done.stdout
    until_told = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "serves at http://" in until_told.stdout.readline()
    until_told.send_signal(signal.SIGTERM)
    assert until_told.wait(60) == 0
    until_told.communicate()
    assert not any(node.pids for node in status(testbed))
