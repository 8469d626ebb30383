"""The server part of `dualpath serve`: HTTP and the coordinator, in a process that a supervisor keeps running."""

import asyncio
import contextlib
import itertools
import socket
from multiprocessing.connection import Connection
from pathlib import Path

from dualpath.cluster.children import end_with_parent, leave_signals_to_the_parent
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.local import Situation
from dualpath.cluster.parts import CAN_NOT_RUN
from dualpath.serving import words as w
from dualpath.serving.cluster_server import ClusterServer, StartErrors, in_one_line
from dualpath.spec.log import start_log

KILL_S = 6.0
"""How long the supervisor may take to kill an engine."""
FACTS_S = 0.2
"""How often is looked whether the ready file's content has changed."""
ENOUGH_S = 10.0
"""How long a server that comes back waits for all engines before a PE and a DE are enough."""


def run_server(
    orders: w.Orders, listener: socket.socket, control: socket.socket | None, pipes: w.Pipes, telling: Connection
) -> None:
    """Serve until told to stop. Exits with code 1 when it can't start or go on, and tells why."""
    leave_signals_to_the_parent()
    end_with_parent(orders.parent)
    start_log(orders.config.log_format)
    try:
        if orders.config.journal is not None and orders.comes_back:
            keep_former(Path(orders.config.journal))
        asyncio.run(_Part(orders, listener, control, pipes).run())
    except StartErrors as error:
        with contextlib.suppress(OSError):
            telling.send(f"{CAN_NOT_RUN}{in_one_line(error)}")
        raise SystemExit(1) from None


def keep_former(journal: Path) -> None:
    """Rename the journal of the coordinator before: one journal is of one scheduler. Raises OSError."""
    if journal.is_file():
        number = next(n for n in itertools.count(1) if not journal.with_name(f"{journal.name}.{n}").exists())
        journal.rename(journal.with_name(f"{journal.name}.{number}"))


class SupervisedEngines:
    """Engines that the supervisor runs. Implements `cluster.local.ClusterCrew`."""

    def __init__(self, pipes: w.Pipes) -> None:
        self._pipes = pipes
        self._coordinator: Coordinator | None = None
        self._hopeless: str | None = None
        self.table: list[dict[str, object]] = []
        self.restarts = 0

    async def begin(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        if self._hopeless is not None:
            coordinator.membership.hopeless(self._hopeless)

    def starting(self) -> list[dict[str, object]]:
        return self.table

    def kill(self, ticket: str) -> None:
        """Blocks, for good reason: nobody may act on the loss before the process is dead."""
        self._pipes.kills.send(ticket)
        if self._pipes.kills.poll(KILL_S):
            self._pipes.kills.recv()

    def ready(self, ticket: str) -> None:
        self._pipes.words.send(w.Joined(ticket))

    def ended(self, ticket: str) -> None:
        if self._coordinator is not None:
            self._coordinator.membership.process_died(ticket)

    def hopeless(self, why: str) -> None:
        self._hopeless = why
        if self._coordinator is not None:
            self._coordinator.membership.hopeless(why)

    async def retire(self, ticket: str) -> None:
        error = "there is no coordinator yet"
        if self._coordinator is not None:
            error = await self._coordinator.retire(ticket)
        self._pipes.words.send(w.Retired(ticket, error))

    def will_end(self) -> None:
        """The supervisor knows: it has said so, or it sees this process end."""

    async def end(self) -> None:
        """The supervisor sees this process end."""


class _Steps:
    """Implements `cluster.local.Standby`."""

    def __init__(self, words: Connection) -> None:
        self._words = words
        self.listen = asyncio.Event()
        self.control = asyncio.Event()

    async def may_listen(self) -> None:
        self._words.send(w.Loaded())
        await self.listen.wait()

    async def may_control(self) -> None:
        await self.control.wait()


class _Part:
    def __init__(
        self, orders: w.Orders, listener: socket.socket, control: socket.socket | None, pipes: w.Pipes
    ) -> None:
        self._orders = orders
        self._pipes = pipes
        self._engines = SupervisedEngines(pipes)
        self._listener = listener
        self._control = control

    async def run(self) -> None:
        orders = self._orders
        self._steps = _Steps(self._pipes.words)
        situation = Situation(
            crew=self._engines if orders.local_engines else None,
            listener=self._listener,
            weights=orders.weights,
            control=self._control,
            standby=self._steps if orders.succeeds else None,
            enough_s=ENOUGH_S if orders.comes_back else None,
        )
        self._server = ClusterServer(orders.config, orders.local_engines, situation)
        self._stops = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving = asyncio.create_task(self._serve())
        asyncio.get_running_loop().add_reader(self._pipes.words, self._listen)
        await asyncio.wait([self._serving])
        if not self._stops:
            self._serving.result()

    async def _serve(self) -> None:
        async with self._server as server:
            telling = asyncio.create_task(self._tell_facts(server))
            try:
                await server.ended()
            finally:
                telling.cancel()

    async def _tell_facts(self, server: ClusterServer) -> None:
        """Keep the ready file right: engines come and go."""
        told: w.Serving | None = None
        while True:
            said = w.Serving(server.facts(), server.welcome(), server.cluster.coordinator.weights)
            if said != told:
                self._pipes.words.send(said)
                told = said
            await asyncio.sleep(FACTS_S)

    def _listen(self) -> None:
        try:
            heard = w.heard(self._pipes.words)
        except (EOFError, OSError):  # the supervisor is gone, and this process about to be killed
            asyncio.get_running_loop().remove_reader(self._pipes.words)
            return
        for word in heard:
            self._obey(word)

    def _obey(self, word: object) -> None:
        match word:
            case w.Stop():
                self._stops += 1
                if self._stops <= 2:
                    self._serving.cancel()
            case w.Table():
                self._engines.table, self._engines.restarts = word.starting, word.restarts
            case w.Ended():
                self._engines.ended(word.ticket)
            case w.Hopeless():
                self._engines.hopeless(word.why)
            case w.Retire():
                task = asyncio.create_task(self._engines.retire(word.ticket))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case w.HandOver():
                self._server.hand_over()
                self._pipes.words.send(w.HandedOver())  # the listener closes with the next turn of the loop
            case w.MayListen():
                self._steps.listen.set()
            case w.MayControl():
                self._steps.control.set()
