"""A whole cluster on this host: the coordinator in this process, its engines in processes of their own."""

import asyncio

from dualpath.runtime.config import ClusterConfig
from dualpath.runtime.coordinator import Coordinator
from dualpath.runtime.supervisor import Supervisor

JOIN_TIMEOUT_S = 180.0
"""How long engines may take to import torch, load the model and join."""


class Cluster:
    """A coordinator and the engines it supervises, as an async context manager: entered once every engine has joined.

    With `local_engines` False it only listens: engines join from elsewhere (`dualpath engine`).
    """

    def __init__(self, config: ClusterConfig, local_engines: bool = True) -> None:
        self.config = config
        self._local_engines = local_engines
        self.coordinator: Coordinator
        self.supervisor: Supervisor
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Cluster":
        self.coordinator = Coordinator(self.config, kill_engine=self._kill)
        self.supervisor = Supervisor(self.config, self.coordinator.control_address)
        await self.coordinator.start()
        try:
            if self._local_engines:
                self.supervisor.start()
                self._watch = asyncio.create_task(self.supervisor.watch(self._on_exit))
            await self.coordinator.membership.complete(JOIN_TIMEOUT_S)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.coordinator.stop()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await asyncio.to_thread(self.supervisor.stop)

    def _kill(self, pid: int) -> None:
        self.supervisor.kill(pid)

    def _on_exit(self, pid: int, why: str) -> None:
        self.coordinator.membership.process_died(pid, why)
