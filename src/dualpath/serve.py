"""`dualpath serve`: a cluster and the OpenAI API in front of it, until a signal or a failure ends them."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.local import Cluster
from dualpath.kv import StoreError
from dualpath.server import create_app, load_tokenizer, serve
from dualpath.spec.whole_file import write_whole


def run(config: ClusterConfig, local_engines: bool = True) -> int:
    """Serve until SIGINT or SIGTERM; returns the process's exit code."""
    try:
        return asyncio.run(_run(config, local_engines))
    except (OSError, RuntimeError, StoreError, TimeoutError, ValueError) as error:
        print(f"dualpath serve: {error}", file=sys.stderr, flush=True)
        return 1


async def _run(config: ClusterConfig, local_engines: bool) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    cluster = Cluster(config, local_engines)
    # Beside the engines' own start: importing Transformers takes seconds.
    tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, config.model))
    entering = asyncio.create_task(cluster.__aenter__())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([entering, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not entering.done():
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        return 0
    await entering
    try:
        app = create_app(cluster.coordinator, await tokenizer, api_keys=config.api_keys)
        serving = asyncio.create_task(
            serve(app, config.host, config.port, on_bound=lambda port: _announce(config, cluster, port))
        )
        watched: list[asyncio.Future[Any]] = [serving, stopping, cluster.coordinator.failure]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for ended in (serving, cluster.coordinator.failure):
            if ended.done() and not ended.cancelled() and ended.exception() is not None:
                raise RuntimeError(f"the server stopped: {ended.exception()!r}") from ended.exception()
    finally:
        await cluster.__aexit__()
    return 0


def _announce(config: ClusterConfig, cluster: Cluster, port: int) -> None:
    """Tell people and programs where the server is, once it accepts connections."""
    url = f"http://{config.host}:{port}"
    engines = cluster.coordinator.health()["engines"]
    print(f"dualpath {config.system} {config.topology} serves {cluster.coordinator.model.name} at {url}/v1", flush=True)
    if config.ready_file is not None:
        facts = {
            "url": url,
            "pid": os.getpid(),
            "engines": engines,
            "control_address": cluster.coordinator.control_address,
        }
        write_whole(Path(config.ready_file), msgspec.json.encode(facts))
