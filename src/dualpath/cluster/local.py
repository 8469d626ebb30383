"""A whole cluster on this host: the coordinator in this process, each engine in its own process."""

import asyncio
import contextlib
from collections.abc import Collection
from typing import Any

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.supervisor import Supervisor
from dualpath.kv import open_store

JOIN_TIMEOUT_S = 180.0
"""How long engines may take to import torch, load the model and join."""


async def wait_out(futures: Collection[asyncio.Future[Any]]) -> None:
    """Wait until all have ended, however often this task is cancelled meanwhile; what they clean up must be done."""
    while not all(future.done() for future in futures):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(futures)


class Cluster:
    """A coordinator and the engines it supervises. An async context manager, entered once every engine has joined.

    With `local_engines` False it starts no engines: they join from other hosts (`dualpath engine`).
    """

    def __init__(self, config: ClusterConfig, local_engines: bool = True) -> None:
        self.config = config
        self.local_engines = local_engines
        self.coordinator: Coordinator
        self.supervisor: Supervisor
        self._open = False

    async def __aenter__(self) -> "Cluster":
        """Raises TimeoutError, RuntimeError, OSError or StoreError that says why the cluster did not start."""
        open_store(self.config.store)  # a location that can't be is told before any process starts
        self.coordinator = Coordinator(self.config, kill_engine=self._kill)
        self.supervisor = Supervisor(self.config, self.coordinator.control_address)
        self._open = True
        try:
            self.coordinator.start()
            if self.local_engines:
                await self._start_engines()
                self.coordinator.watch(asyncio.create_task(self.supervisor.watch(self._on_exit)))
            await self._complete()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _start_engines(self) -> None:
        """On a thread, because it waits for torch's import; left only when it is done, so that no engine is missed."""
        starting = asyncio.ensure_future(asyncio.to_thread(self.supervisor.start))
        try:
            await asyncio.shield(starting)
        finally:
            self.supervisor.start_no_more()
            await wait_out([starting])

    def progress(self) -> dict[str, object]:
        """Returns what /health says while the cluster starts: which engines are ready, and what the others do."""
        if not self._open:
            return {"status": "loading", "engines": [], "starting": []}
        ready = self.coordinator.engines()
        joined = {engine["pid"] for engine in ready}
        starting = [
            {"name": name, "pid": pid, "step": self.supervisor.steps.get(pid, "")}
            for pid, name in self.supervisor.pids.items()
            if pid not in joined
        ]
        return {"status": "loading", "engines": ready, "starting": starting}

    async def _complete(self) -> None:
        """Wait until every engine has joined or the coordinator breaks."""
        joining = asyncio.create_task(self.coordinator.membership.complete(JOIN_TIMEOUT_S))
        try:
            await asyncio.wait([joining, self.coordinator.failure], return_when=asyncio.FIRST_COMPLETED)
            if self.coordinator.failure.done():
                self.coordinator.failure.result()
            await joining
        finally:
            joining.cancel()

    async def __aexit__(self, *_: object) -> None:
        """Stop everything; a second call does nothing."""
        if not self._open:
            return
        self._open = False
        await self.coordinator.stop()
        await asyncio.to_thread(self.supervisor.stop)

    def _kill(self, pid: int) -> None:
        self.supervisor.kill(pid)

    def _on_exit(self, pid: int, why: str) -> None:
        self.coordinator.membership.process_died(pid, why)
