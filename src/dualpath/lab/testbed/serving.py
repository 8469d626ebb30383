"""Runs a cluster in a testbed that is up, until it is stopped."""

import asyncio
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dualpath.lab.testbed.launcher import TestbedCluster, TestbedLauncher
from dualpath.lab.testbed.network import Testbed


def serve_inside(
    testbed: Testbed,
    model: Path,
    store: Path,
    topology: str,
    system: str,
    logs: Path,
    then: Sequence[str] = (),
    options: Sequence[str] = (),
) -> int:
    """Serves until SIGINT or SIGTERM, or until the command `then` ends, which finds the server's address in
    ``DUALPATH_URL``. Returns the command's exit code, or 0.
    `options` go to every process of the cluster.

    Raises LaunchError, OSError, and ValueError for a topology that can't be.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dualpath-testbed-") as work:
        launcher = TestbedLauncher(
            testbed, model=model, rates=testbed.rates, logs=logs, work=Path(work), options=options
        )
        cluster = TestbedCluster(launcher, f"{topology} {system}", topology, system, store, testbed.rates)
        return asyncio.run(_serve(cluster, then))


async def _serve(cluster: TestbedCluster, then: Sequence[str]) -> int:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    stopping = asyncio.create_task(stop.wait())
    serving = asyncio.create_task(_until_done(cluster, then, stop))
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        return 0
    stopping.cancel()
    return serving.result()


async def _until_done(cluster: TestbedCluster, then: Sequence[str], stop: asyncio.Event) -> int:
    async with cluster:
        print(f"{cluster.name} serves at {cluster.url}/v1", flush=True)
        if not then:
            await cluster.run(stop.wait())
            return 0
        process = await asyncio.create_subprocess_exec(*then, env=os.environ | {"DUALPATH_URL": cluster.url})
        try:
            return await cluster.run(process.wait())
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
