"""A cluster on this host: a coordinator in this process, and the engine processes that a supervisor keeps running."""

import asyncio
import contextlib
import socket
from typing import Protocol

import msgspec

from dualpath.cluster.children import Child
from dualpath.cluster.cluster_secret import cluster_secret, tell_engines
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.coordinator.membership import Crew
from dualpath.cluster.engine_parts import all_parts, node_parts
from dualpath.cluster.leftovers import Sweep
from dualpath.cluster.supervisor import Supervisor
from dualpath.kv import open_store


class ClusterCrew(Crew, Protocol):
    """Who runs a cluster's engines, from the start to the end."""

    async def begin(self, coordinator: Coordinator) -> None:
        """Start the engines, or learn which coordinator they have. Raises ValueError when there are too many."""
        ...

    def will_end(self) -> None:
        """The cluster ends: from now on nothing is brought back."""
        ...

    async def end(self) -> None:
        """End the engines; none is left when it returns."""
        ...


class OwnEngines:
    """Engines that this process starts and keeps running. Implements `ClusterCrew`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self.coordinator: Coordinator
        self.supervisor: Supervisor | None = None

    async def begin(self, coordinator: Coordinator) -> None:
        """Start the topology's engines. Raises ValueError when there are too many of them."""
        self.coordinator = coordinator
        self.supervisor = Supervisor(
            all_parts(node_parts(self._config, coordinator.control_address, lambda: coordinator.weights[0])),
            sweep=Sweep(self._config.transport),
            on_end=self._ended,
            on_hopeless=coordinator.membership.hopeless,
        )
        await self.supervisor.start()

    @property
    def restarts(self) -> int:
        return self.supervisor.restarts if self.supervisor is not None else 0

    def starting(self) -> list[dict[str, object]]:
        return self.supervisor.starting() if self.supervisor is not None else []

    def kill(self, ticket: str) -> None:
        if self.supervisor is not None:
            self.supervisor.kill(ticket)

    def ready(self, ticket: str) -> None:
        if self.supervisor is not None:
            self.supervisor.ready(ticket)

    def _ended(self, child: Child, _why: str) -> None:
        self.coordinator.membership.process_died(child.ticket)

    async def end(self) -> None:
        if self.supervisor is not None:
            await self.supervisor.stop()

    def will_end(self) -> None:
        """From now on nothing is brought back."""
        if self.supervisor is not None:
            self.supervisor.start_no_more()


class NoEngines(OwnEngines):
    """All engines join from other hosts (`dualpath engine`)."""

    async def begin(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        await Sweep(self._config.transport)()


class Standby(Protocol):
    """The steps of a successor's start. Each waits until the server before it has gone that far."""

    async def may_listen(self) -> None:
        """It takes no more connections."""
        ...

    async def may_control(self) -> None:
        """It has ended all its requests, and no longer controls the engines."""
        ...


class Situation(msgspec.Struct):
    """What a cluster and its server find when somebody else runs part of them: all None where nobody does."""

    crew: ClusterCrew | None = None
    """Who runs the engines; None: the cluster does."""
    listener: socket.socket | None = None
    """Where the server listens; None: it binds the configured address."""
    weights: tuple[str, str] | None = None
    """What the coordinator before has served at last: the checkpoint's path, and its version."""
    control: socket.socket | None = None
    """Listens at the control address; None: the coordinator binds it."""
    standby: Standby | None = None
    """Set for a successor."""
    enough_s: float | None = None
    """After so many seconds a PE and a DE are enough to serve; None: all engines must join, as at a cluster's start."""


class Cluster:
    """A coordinator and the engines of its crew. An async context manager, entered once every engine has joined.

    With `local_engines` False it starts no engines: they join from other hosts.
    """

    def __init__(self, config: ClusterConfig, local_engines: bool = True, situation: Situation | None = None) -> None:
        self.config = config
        self._situation = situation or Situation()
        self._own = OwnEngines if local_engines else NoEngines
        self.crew: ClusterCrew = self._situation.crew or self._own(config)
        self._secret = contextlib.ExitStack()
        """Forgets a secret that was made for this cluster."""
        self.coordinator: Coordinator
        self.keeps_engines = False
        """Whether engines stay when it is left, for another coordinator."""
        self._open = False

    @property
    def supervisor(self) -> Supervisor:
        """Of the engines that this process has started."""
        assert isinstance(self.crew, OwnEngines) and self.crew.supervisor is not None
        return self.crew.supervisor

    async def __aenter__(self) -> "Cluster":
        """Raises TimeoutError, RuntimeError, OSError or StoreError that says why the cluster did not start."""
        open_store(self.config.store)  # a location that can't be is told before any process starts
        given, tell = self.config.cluster_secret, tell_engines if self._own is NoEngines else None
        secret = self._secret.enter_context(cluster_secret(given, tell))
        self.config = msgspec.structs.replace(self.config, cluster_secret=secret)
        self.crew = self._situation.crew or self._own(self.config)
        try:
            self.coordinator = Coordinator(self.config, self.crew, self._situation.control, self._situation.weights)
        except BaseException:
            self._secret.close()
            raise
        self._open = True
        try:
            self.coordinator.start()
            await self.crew.begin(self.coordinator)
            await self._complete()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    def progress(self) -> dict[str, object]:
        """Returns what /health says while the cluster starts: which engines are ready, and what the others do."""
        if not self._open:
            return {"status": "loading", "engines": [], "starting": []}
        return {"status": "loading", "engines": self.coordinator.engines(), "starting": self.crew.starting()}

    async def _complete(self) -> None:
        """Wait until every engine has joined or the coordinator breaks."""
        membership, timeout_s = self.coordinator.membership, self.config.join_timeout_s
        joining = asyncio.create_task(membership.complete(timeout_s, self._situation.enough_s))
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
        self.crew.will_end()
        await self.coordinator.stop(keep_engines=self.keeps_engines)
        await self.crew.end()
        self._secret.close()
