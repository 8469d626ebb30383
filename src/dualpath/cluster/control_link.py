"""A member's end of the control plane: its socket, its heartbeats, and what it does when it loses its coordinator.

A coordinator is lost when it is silent for two leases, has restarted (another *epoch*), or no longer knows the member.
The member then keeps its memory, lets go of all that it has in hand for that coordinator, and joins again under a new
ZeroMQ identity: nothing that was still queued, either way, is taken for news of the next epoch. Without a coordinator
for the whole grace period, it leaves.

A process may have several links, one for each of its members. Nothing here needs torch.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import zmq
import zmq.asyncio

from dualpath.cluster import messages as m
from dualpath.cluster.cluster_secret import SECRET_VARIABLE, ClusterSecret
from dualpath.cluster.curve import handshakes, refused, secure_client
from dualpath.core.vocabulary import EngineId
from dualpath.spec import metrics
from dualpath.spec.log import ROOT
from dualpath.spec.metrics import Figures

logger = logging.getLogger(f"{ROOT}.member")

ABANDONED = "abandoned"
"""How the reason of a member begins that leaves because its grace period is over."""
_STORED_BLOCKS = 1024
"""How many blocks a member can name to its next coordinator, which may have looked into the store before they came."""
_TRY_AGAIN_S = 1.0
Handler = Callable[[m.ToEngine], None]
ComeBack = Callable[[], Awaitable[m.Join]]
"""Lets go of all that the member has in hand for a coordinator that it has lost, then returns its next `Join`."""


class ControlLink:
    """One member's link to the coordinator. Used from one asyncio thread."""

    def __init__(self, secret: ClusterSecret, *, heartbeat_ns: int, lease_ns: int, grace_s: float) -> None:
        self._secret = secret
        self.malformed_messages = 0
        self.engine: EngineId | None = None
        """The member's id; None while it has not joined."""
        self.epoch = 0
        """The coordinator's, as it has said in its `Welcome`."""
        self.gauge_sources: list[Callable[[], Figures]] = []
        """What each heartbeat reports."""
        self.alive: Callable[[], bool] = lambda: True
        """Whether to beat: False lets the member's lease expire."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Gets the reason when the member has to leave, ConnectionRefusedError when the coordinator refuses it."""
        self._heartbeat_ns = heartbeat_ns
        self._lease_ns = lease_ns
        self._grace_s = grace_s
        self._address = ""
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        """None while the member lets go."""
        self._listening: asyncio.Task[None] | None = None
        self._come_back: ComeBack | None = None
        self._handle: Handler
        self._heard_ns = 0
        self._stored: deque[m.StoredBlock] = deque(maxlen=_STORED_BLOCKS)
        """The last ones that this member has written; what it said of them may have been lost."""
        self._was_member = False
        self._was_refused = False
        """Since it was one."""
        self._dismissed = False
        self._reason = "closed"
        self._tasks: set[asyncio.Task[Any]] = set()

    def connect(self, address: str) -> None:
        """Raises ValueError when this is no address; the coordinator need not be there yet."""
        self._address = address
        self._socket = socket = self._context.socket(zmq.DEALER)
        secure_client(socket, self._secret)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.LINGER, 500)
        socket.set_hwm(m.CONTROL_QUEUE_MESSAGES)
        events = handshakes(socket)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            events.close()
            raise ValueError(
                f"{address!r} is not an address ({error}); give one such as tcp://10.0.0.1:5555"
            ) from error
        self.spawn(self._watch_handshakes(events))

    async def _watch_handshakes(self, events: zmq.asyncio.Socket) -> None:
        """Say it when the coordinator refuses us. That is the end of a member that was none yet."""
        try:
            while (for_good := await refused(events)) is not None:
                why = (
                    f"the coordinator at {self._address} refuses our handshake: it has another cluster secret, or is "
                    f"no coordinator; give every host the same --cluster-secret-file or ${SECRET_VARIABLE}"
                )
                if not self._was_member:
                    self._refuse(why)
                    return
                if not self._was_refused:
                    logger.warning("%s; we go on trying", why)
                self._was_refused = True
                if for_good:
                    self._lose("what listens there is no coordinator", self._handle)
        finally:
            events.close()

    async def run(self, join: m.Join, handle: Handler, come_back: ComeBack | None = None) -> str:
        """Join, then pass every message to `handle` until told or forced to leave. Returns the reason for leaving.

        Without `come_back` the member leaves when it loses its coordinator. Raises ConnectionRefusedError when the
        coordinator refuses it.
        """
        self._heard_ns = time.monotonic_ns()
        self._come_back, self._handle = come_back, handle
        self._join(join, handle)
        self.spawn(self._beat(handle))
        try:
            self._reason = await self.ended
        finally:
            await self.end_tasks()
        return self._reason

    def _join(self, join: m.Join, handle: Handler) -> None:
        self._send(join)
        self._listening = self.spawn(self._listen(handle))

    def send(self, message: m.FromEngine) -> None:
        """Queue a message to the coordinator; never blocks. While the member has not joined, only blocks are kept."""
        if isinstance(message, m.Stored):
            self._stored.extend(message.blocks)
        if self.engine is not None:
            self._send(message)

    def _send(self, message: m.FromEngine) -> None:
        if self._socket is not None:
            sending = self._socket.send(m.encoder.encode(message), flags=zmq.NOBLOCK)
            asyncio.ensure_future(sending).add_done_callback(self._on_sent)

    def _on_sent(self, sent: "asyncio.Future[Any]") -> None:
        if not sent.cancelled() and sent.exception() is not None and self.engine is not None:
            self.leave(f"the coordinator can't be reached: {sent.exception()}")

    async def _listen(self, handle: Handler) -> None:
        socket = self._socket
        assert socket is not None
        while not socket.closed:
            try:
                message = m.to_engine(await socket.recv_multipart())
            except m.BadMessageError:
                self.malformed_messages += 1
                continue
            self._heard_ns = time.monotonic_ns()
            match message:
                case m.HeartbeatAck():
                    if self.engine is not None and message.epoch != self.epoch:
                        self._lose("it has restarted", handle)
                case m.Welcome():
                    self.engine, self.epoch, self._was_member = message.engine, message.epoch, True
                    self._was_refused = False
                    if self._stored:
                        self._send(m.Stored(list(self._stored)))
                case m.NotMember():
                    self._lose(message.reason, handle)
                case m.Shutdown():
                    self._dismissed = True
                    self.leave(message.reason)
                case m.Refusal():
                    self._dismissed = True
                    self._refuse(message.reason)
                case _:
                    handle(message)

    def _lose(self, why: str, handle: Handler) -> None:
        """The coordinator is gone, or we are for it: come back, once nothing that was for it is in hand any more."""
        if self._come_back is None:
            self.leave(f"the coordinator is lost: {why}")
        elif self._socket is not None and not self.ended.done():
            logger.warning(
                "member %s has lost its coordinator (%s); it keeps its memory and joins again", self.engine, why
            )
            if self._listening is not None:
                self._listening.cancel()
            self._socket.close(linger=0)
            self._socket = self.engine = None
            self.spawn(self._return(self._come_back, handle))

    async def _return(self, come_back: ComeBack, handle: Handler) -> None:
        join = await come_back()
        if self._was_refused:
            await asyncio.sleep(_TRY_AGAIN_S)
        self.connect(self._address)
        self._join(join, handle)

    async def _beat(self, handle: Handler) -> None:
        while True:
            gauges: Figures = {}
            for source in self.gauge_sources:
                gauges |= source()
            gauges[metrics.ENGINE_MALFORMED_MESSAGES()] = float(self.malformed_messages)
            if self.alive():
                self._send(m.Heartbeat(gauges))
            await asyncio.sleep(self._heartbeat_ns / 1e9)
            silent_s = (time.monotonic_ns() - self._heard_ns) / 1e9
            if silent_s > self._grace_s:
                where = f"{self._address} for {silent_s:.0f} s; see whether `dualpath serve --join-address` runs there"
                self.leave(f"{ABANDONED}: no coordinator answered at {where}")
            elif self.engine is not None and silent_s > 2 * self._lease_ns / 1e9:
                self._lose(f"silent for {silent_s:.0f} s", handle)

    def tag(self, engine: EngineId | None) -> str:
        """Returns what an engine is called at data servers: ids begin anew with each epoch."""
        return f"{self.epoch:x}.{engine}"

    def _refuse(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionRefusedError(why))

    def leave(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a task that this link owns. If it raises, that is a bug, and the member leaves."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "an engine task failed", "exception": task.exception(), "task": task}
            )
            self.leave(f"internal error: {task.exception()!r}")

    async def end_tasks(self) -> None:
        """Cancel every task and wait until all have ended."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def close(self) -> None:
        """Tell the coordinator that the member has left. From here on it must not touch any memory of others."""
        if not self._dismissed and self.engine is not None:
            self.send(m.Leave(self._reason))
        if self._socket is not None:
            self._socket.close()
        self._context.term()
