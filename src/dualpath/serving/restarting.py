"""A rolling restart: every part in turn is replaced by a new process, and no request is lost.

A node's new agent starts beside the old one. Each of its engines gets no more requests, ends those that it has, and
leaves; then a new one starts and attaches to the new agent. Where it is the only one of its role, the new one joins
first. The old agent ends when it has no engine left.

Then comes the server. A successor loads; the old one takes no more connections and answers what it has; the successor
takes new connections meanwhile and lets their requests wait; when the old one has ended, engines join the successor,
with their memory as it is, and it answers.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from dualpath.cluster.attachment import LISTENS
from dualpath.cluster.children import Child
from dualpath.cluster.engine_parts import NodeParts
from dualpath.cluster.parts import ReplaceError
from dualpath.cluster.supervisor import Supervisor
from dualpath.serving import words as w
from dualpath.serving.server_part import SERVER, ServerPart

Say = Callable[[str], None]
"""Takes a line about how far it is."""
LAST_WORDS_S = 20.0
"""How long a server may take to end beyond the time that its requests have."""


class RollingRestart:
    """One restart at a time. `timeout_s` bounds a start, `patience_s` how long requests in hand may take.

    With `one_at_a_time` an engine's device has no room for two: the old one ends first, and requests wait.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        server: ServerPart,
        nodes: list[NodeParts],
        *,
        timeout_s: float,
        patience_s: float,
        one_at_a_time: bool = False,
    ) -> None:
        self._supervisor = supervisor
        self._server = server
        self._nodes = nodes
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._one_at_a_time = one_at_a_time
        self._turn = asyncio.Lock()

    async def run(self, say: Say) -> None:
        """Raises ReplaceError: the part that it names was not replaced, nor those after it."""
        if self._turn.locked():
            raise ReplaceError("another restart is in progress")
        async with self._turn:
            for node in self._nodes:
                say(f"restarts {node.agent.name}")
                retire = partial(self._retire_agent, node, say)
                await self._supervisor.replace(node.agent.name, retire, first=True, timeout_s=self._timeout_s)
            say(f"restarts the {SERVER}")
            await self._supervisor.replace(SERVER, self._retire_server, first=True, timeout_s=self._timeout_s)

    async def _retire_agent(self, node: NodeParts, say: Say, old: Child, new: Child | None) -> None:
        """Replace the node's engines, which attach to the new agent; the old one has nothing to do then."""
        assert new is not None
        await self._supervisor.until_ready(new, self._timeout_s, says=LISTENS)
        of_role = Counter(_role(engine.name) for other in self._nodes for engine in other.engines)
        for engine in node.engines:
            say(f"restarts {engine.name}")
            alone = of_role[_role(engine.name)] == 1 and not self._one_at_a_time
            await self._supervisor.replace(engine.name, self._retire_engine, first=alone, timeout_s=self._timeout_s)
        await asyncio.to_thread(old.kill)

    async def _retire_engine(self, old: Child, new: Child | None) -> None:
        if new is not None:
            await self._supervisor.until_ready(new, self._timeout_s)
        self._server.say(self._supervisor.child(SERVER), w.Retire(old.ticket))
        answer = await self._server.answer(old, w.Retired, self._patience_s + LAST_WORDS_S)
        if answer.error:
            raise ReplaceError(f"{old.name} stays: {answer.error}")
        if old.leads_session:  # a server of vLLM, which serves on without its cluster
            await asyncio.to_thread(old.kill)

    async def _retire_server(self, old: Child, new: Child | None) -> None:
        assert new is not None
        await self._server.answer(new, w.Loaded, self._timeout_s)
        self._server.say(old, w.HandOver())
        await self._server.answer(old, w.HandedOver, self._timeout_s)
        self._server.say(new, w.MayListen())
        try:
            await self._server.gone(old, self._patience_s)
        except ReplaceError:
            self._server.say(old, w.Stop())
            await self._server.gone(old, self._patience_s + LAST_WORDS_S)
        self._server.say(new, w.MayControl())


def _role(name: str) -> str:
    return name.partition("-")[0]
