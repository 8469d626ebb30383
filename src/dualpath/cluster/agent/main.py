"""A node agent from start to end: the node's data plane, and the control links of its engines. It needs no torch.

Engines attach at a Unix socket. For each, the agent makes a `Member`: a buffer, a CNIC and a data server (`host`), and
a worker that handles the coordinator's messages (`prefill`, `decode`). All share the node's SNIC. When an engine's
connection ends, its member ends too, once nothing moves any more; the engine may attach again.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from dualpath.cluster.agent.attached import AttachedEngine
from dualpath.cluster.agent.data_plane import DataPlanes
from dualpath.cluster.agent.gathering import Gathering
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.agent.layer_threads import LayerThreads
from dualpath.cluster.agent.member import Member
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.cluster.attachment import LEAVE, LISTENS, AgentConfig, Attach, Leave
from dualpath.cluster.attachment_frames import Connection, NotAPeerError, first_record
from dualpath.cluster.siblings import kill_stopped_siblings
from dualpath.cluster.vllm_attachment import AttachWorker
from dualpath.kv import StoreError
from dualpath.spec.log import ROOT, start_log
from dualpath.transfer.traffic import TrafficManager

FIRST_RECORD_S = 10.0
"""How long a process that connects may take to say what it is."""
BACKLOG = 64
STOP_S = 5.0
"""How long members may take to free everything when the agent is told to stop."""

logger = logging.getLogger(f"{ROOT}.agent")


def run_agent(config: AgentConfig, tell: Callable[[str], None]) -> None:
    """Serve the node's engines until the supervisor ends this process. Exits with code 1 when it can't."""
    start_log(config.cluster.log_format)
    try:
        asyncio.run(_serve(config, tell))
    except (OSError, ValueError, StoreError) as error:
        tell(f"can't run: {' '.join(str(error).split())}")
        raise SystemExit(1) from error


async def _serve(config: AgentConfig, tell: Callable[[str], None]) -> None:
    dismissed = asyncio.Event()
    parent = os.getppid()
    asyncio.get_running_loop().add_signal_handler(LEAVE, dismissed.set)
    async with NodeAgent(config):
        tell(LISTENS)
        await dismissed.wait()
        signal.alarm(round(2 * STOP_S))  # whatever hangs must not outlive the supervisor
    if os.getppid() != parent:
        kill_stopped_siblings()


class NodeAgent:
    """An async context manager, entered once engines can attach."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        snic = TrafficManager(snic_bytes_per_s=config.cluster.snic_rate).snic
        self._planes = DataPlanes(config.cluster, snic)
        self._layers: dict[str, LayerThreads] = {}
        """By attachment."""
        self.members: set[Member] = set()
        """The engines that are attached."""
        self._gathering = Gathering()
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    async def __aenter__(self) -> "NodeAgent":
        """Raises OSError when it can't listen."""
        Path(self._config.socket).unlink(missing_ok=True)  # that of a killed agent, or of one that this replaces
        self._socket.setblocking(False)
        self._socket.bind(self._config.socket)
        self._socket.listen(BACKLOG)
        self._inode = Path(self._config.socket).stat().st_ino
        self._spawn(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.members:
            member.leave("its node stops")
        if self.members:
            await asyncio.wait([member.ended for member in self.members], timeout=STOP_S)
        self._gathering.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._planes.close()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if Path(self._config.socket).stat().st_ino == self._inode:  # else it is its successor's
                Path(self._config.socket).unlink()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(self._socket)
            accepted.setblocking(False)
            self._spawn(self._meet(accepted))

    async def _meet(self, accepted: socket.socket) -> None:
        """Find out what has connected; drop what is no engine of ours."""
        try:
            async with asyncio.timeout(FIRST_RECORD_S):
                first = await first_record(accepted)
        except (TimeoutError, NotAPeerError, ConnectionError) as error:
            logger.warning("a connection to %s is refused: %s", self._config.name, error or "it says nothing")
            accepted.close()
            return
        if isinstance(first, Attach | AttachWorker):
            await self._attach(first, accepted)
            return
        layers = self._layers.get(first.attachment)
        if layers is None:
            accepted.close()
            return
        accepted.setblocking(True)
        layers.serve(first.way, Connection(accepted))

    async def _attach(self, said: Attach | AttachWorker, accepted: socket.socket) -> None:
        """Serve an engine of our own, or with its last worker one of a vLLM server."""
        reader, writer = await asyncio.open_unix_connection(sock=accepted)
        if isinstance(said, Attach):
            await self._serve(AttachedEngine(said, reader, writer))
        elif (engine := await self._gathering.add(said, reader, writer)) is not None:
            await self._serve(engine)

    async def _serve(self, engine: AttachedEngine | VllmEngine) -> None:
        """Serve one engine until its connection ends or the coordinator dismisses it."""
        try:
            member = await self._member(engine)
        except (OSError, ValueError, StoreError) as error:
            engine.tell(Leave(f"its agent can't serve it: {error}", failed=True, refused=True))
            engine.close(str(error))
            return
        except BaseException:
            engine.close("its agent ends")
            raise
        attachment = uuid.uuid4().hex
        try:
            self._layers[attachment] = member.layers
            self.members.add(member)
            member.host.tell_pool(attachment)
            await member.serve()
        finally:
            self.members.discard(member)
            self._layers.pop(attachment, None)

    async def _member(self, engine: AttachedEngine | VllmEngine) -> Member:
        """Raises OSError, ValueError or StoreError when the engine can't be served."""
        plane = await self._planes.open(engine.facts)
        try:
            return Member(EngineHost(self._config, engine, plane))
        except BaseException:
            plane.close()
            raise
