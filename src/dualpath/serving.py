"""A cluster with its OpenAI server, in this process: `dualpath serve` and `dualpath.Server` run it."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.local import Cluster
from dualpath.kv import StoreError
from dualpath.server import bind, create_app, load_tokenizer, serve
from dualpath.spec.whole_file import write_whole

StartErrors = (OSError, RuntimeError, StoreError, TimeoutError, ValueError)
"""The exceptions of entering a `ClusterServer` when the cluster can't start; the message says why."""


class ClusterServer:
    """A cluster and its server. An async context manager, entered once all engines have joined and the port is open.

    With `local_engines` False, engines join from other hosts (`dualpath engine`). Entering raises `StartErrors`.
    """

    def __init__(self, config: ClusterConfig, local_engines: bool = True) -> None:
        self.config = config
        self.cluster = Cluster(config, local_engines)
        self._serving: asyncio.Task[None] | None = None
        self._port: asyncio.Future[int] | None = None

    @property
    def url(self) -> str:
        """``http://host:port``; the API is below ``/v1``."""
        assert self._port is not None and self._port.done()
        return f"http://{self.config.host}:{self._port.result()}"

    async def __aenter__(self) -> "ClusterServer":
        listener = bind(self.config.host, self.config.port)
        try:
            return await self._start(listener)
        except BaseException:
            listener.close()
            raise

    async def _start(self, listener: socket.socket) -> "ClusterServer":
        # In parallel with the engines' start, because importing Transformers takes seconds.
        tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, self.config.model))
        await self.cluster.__aenter__()
        try:
            app = create_app(
                self.cluster.coordinator,
                await tokenizer,
                api_keys=self.config.api_keys,
                tool_call_parser=self.config.tool_call_parser,
                reasoning_parser=self.config.reasoning_parser,
                enable_control=self.config.enable_control,
            )
            self._port = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(
                serve(app, listener, on_bound=self._port.set_result, drain_s=self.config.drain_s)
            )
            either: list[asyncio.Future[Any]] = [self._port, self._serving]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._port.done():
                await self._serving
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give running requests `drain_s` to end, then stop the cluster. Cancelled: end them at once."""
        try:
            if self._serving is not None:
                self._serving.cancel()
                await asyncio.gather(self._serving, return_exceptions=True)
        finally:
            await self.cluster.__aexit__()

    async def ended(self) -> None:
        """Wait until it can't serve any more, then raise RuntimeError that says why."""
        assert self._serving is not None
        watched: list[asyncio.Future[Any]] = [self._serving, self.cluster.coordinator.failure]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for one in watched:
            if one.done() and not one.cancelled() and one.exception() is not None:
                raise RuntimeError(f"the server stopped: {one.exception()!r}") from one.exception()

    def facts(self) -> dict[str, object]:
        """Returns the content of the ready file."""
        coordinator = self.cluster.coordinator
        return {
            "url": self.url,
            "pid": os.getpid(),
            "engines": coordinator.health()["engines"],
            "control_address": coordinator.control_address,
        }


def run(config: ClusterConfig, local_engines: bool = True) -> int:
    """Serve until SIGINT or SIGTERM. Returns the process's exit code."""
    try:
        return asyncio.run(_until_signalled(config, local_engines))
    except StartErrors as error:
        print(f"dualpath serve: {error}", file=sys.stderr, flush=True)
        return 1


async def _until_signalled(config: ClusterConfig, local_engines: bool) -> int:
    """Serve; the first signal begins the drain, the second ends it."""
    loop, signalled = asyncio.get_running_loop(), 0
    serving = asyncio.create_task(_serve(config, local_engines))

    def stop() -> None:
        nonlocal signalled
        signalled += 1
        if signalled <= 2:
            serving.cancel()

    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop)
    await asyncio.wait([serving])
    if not signalled:
        serving.result()
    return 0


async def _serve(config: ClusterConfig, local_engines: bool) -> None:
    async with ClusterServer(config, local_engines) as server:
        name = server.cluster.coordinator.model.name
        print(f"dualpath {config.system} {config.topology} serves {name} at {server.url}/v1", flush=True)
        if config.ready_file is not None:
            write_whole(Path(config.ready_file), msgspec.json.encode(server.facts()))
        await server.ended()
