"""Cluster membership: engines that join, engines that are refused, engines that are lost.

The first prefill engine *founds* the cluster. It reports the model and the speed of a PE, which the scheduler's
constants need; then the prefix index is read from storage. Engines that join earlier wait for this, and keep their
leases by heartbeats. All engines must have the same model and layout.
"""

import asyncio
import math
import time
from typing import Protocol

import msgspec

from dualpath.cluster import messages as m
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.links import EngineLink, EngineLinks
from dualpath.cluster.coordinator.reachability import why_unreachable
from dualpath.core.vocabulary import EngineFacts, EngineId, NodeId, Role

_LOOK_S = 0.5
"""How often a start that may be content with fewer engines looks whether they are enough."""


class Members(Protocol):
    """What the coordinator does when membership changes."""

    def watch(self, task: "asyncio.Task[None]") -> None:
        """Own a task; if the task fails, the cluster fails."""
        ...

    async def found(self, join: m.Join, prefill_tokens_per_s: float) -> None: ...

    def engine_joined(self, facts: EngineFacts) -> None: ...

    def engine_lost(self, engine: EngineId) -> None: ...

    def broken(self, error: BaseException) -> None: ...


class Crew(Protocol):
    """Who has started the engines of this host. Tickets that are not of its children mean nothing to it."""

    def kill(self, ticket: str) -> None:
        """End that process, and return once it is dead: it then touches no memory any more."""
        ...

    def ready(self, ticket: str) -> None:
        """That engine is a member now."""
        ...

    @property
    def restarts(self) -> int:
        """How many processes had ended and were started again."""
        ...

    def starting(self) -> list[dict[str, object]]:
        """Returns its children that are not ready, and what each does, for /health."""
        ...


class Membership:
    """Used from one asyncio thread."""

    def __init__(
        self,
        config: ClusterConfig,
        links: EngineLinks,
        members: Members,
        crew: Crew | None,
    ) -> None:
        self._config = config
        self._links = links
        self._members = members
        self._crew = crew
        self._first: m.Join | None = None
        self._founding: asyncio.Task[None] | None = None
        self._founded = False
        self.closed = ""
        """Why nobody may join at the moment; empty when engines may."""
        self.refused_engines = 0
        self.lost_engines = 0
        self._nodes: dict[str, NodeId] = {}
        self.returned_engines = 0
        self._complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def complete(self, timeout_s: float, enough_s: float | None = None) -> None:
        """Wait until every engine of the topology has joined; after `enough_s`, a PE and a DE are enough.

        Raises TimeoutError that says how many have joined, RuntimeError when one can't start.
        """
        began_s = time.monotonic()
        while not self._complete.done():
            await asyncio.wait([self._complete], timeout=min(_LOOK_S, timeout_s))
            waited_s = time.monotonic() - began_s
            if enough_s is not None and waited_s > enough_s and self.status != "unavailable":
                return
            if waited_s > timeout_s and not self._complete.done():
                raise TimeoutError(
                    f"after {timeout_s:.0f} s {self.count(Role.PREFILL)} prefill and {self.count(Role.DECODE)} decode "
                    f"engines of {self._config.topology} have joined; the logs of the others say what holds them up"
                )
        self._complete.result()

    def count(self, role: Role) -> int:
        return sum(link.join.role is role for link in self._links.by_engine.values())

    @property
    def status(self) -> str:
        """``ok``, ``degraded`` (fewer engines than the topology has) or ``unavailable`` (no PE or no DE)."""
        missing = [self._wanted(role) - self.count(role) for role in Role]
        if not (self.count(Role.PREFILL) and self.count(Role.DECODE)):
            return "unavailable"
        return "degraded" if max(missing) > 0 else "ok"

    def _wanted(self, role: Role) -> int:
        topology = self._config.topology
        return topology.prefill_engines if role is Role.PREFILL else topology.decode_engines

    @property
    def of_vllm(self) -> bool:
        """Whether the engines are vLLM servers."""
        return self._first is not None and bool(self._first.url)

    def join(self, identity: bytes, join: m.Join) -> None:
        """Admit, refuse or hold an engine that asks to join.

        One that comes back has let go of all that it did before. It is admitted first, so that its requests find it.
        """
        refusal = self._refusal(join)
        if refusal is not None:
            self.refused_engines += 1
            self._links.send_to(identity, m.Refusal(refusal))
            return
        self._first = self._first or join
        former = self._links.of_ticket(join.ticket)
        link = self._links.expect(identity, join)
        if self._founded:
            self._admit(link)
        elif self._founding is None and join.prefill_tokens_per_s is not None:
            self._founding = asyncio.create_task(self._found(join, join.prefill_tokens_per_s))
            self._members.watch(self._founding)
        for before in former:
            self.returned_engines += 1
            self._remove(before)

    def serve_weights(self, fingerprint: str) -> None:
        """From now on only engines with these weights may join."""
        assert self._first is not None
        self._first = msgspec.structs.replace(self._first, model_fingerprint=fingerprint)

    async def _found(self, join: m.Join, prefill_tokens_per_s: float) -> None:
        await self._members.found(join, prefill_tokens_per_s)
        self._founded = True
        for link in self._links.all():
            self._admit(link)

    def _refusal(self, join: m.Join) -> str | None:
        """Returns why an engine can't join this cluster; None when it can."""
        if self.closed:
            return self.closed
        if join.buffer_blocks < 1 or (join.role is Role.DECODE and join.hbm_blocks < 1):
            return f"its buffer ({join.buffer_blocks} blocks) and device memory ({join.hbm_blocks}) hold no Full Block"
        if join.role is Role.PREFILL and not 0 < (join.prefill_tokens_per_s or 0) < math.inf:
            return f"a prefill engine must tell its speed; it said {join.prefill_tokens_per_s} tokens per second"
        if any(
            join.node and link.join.node == join.node and link.join.role is not join.role for link in self._links.all()
        ):
            return f"node {join.node} has engines of the other role; a node has one role, so give it another name"
        others = [link.join for link in self._links.all()]
        why = why_unreachable(join, self._config.transport, self._links.sender_address, others)
        if why is not None:
            return why
        first = self._first
        if first is not None and bool(join.url) is not bool(first.url):
            kind = {True: "a vLLM server", False: "an engine of our own"}
            return f"it is {kind[bool(join.url)]}, and the cluster's first engine is {kind[bool(first.url)]}"
        if first is None or (join.layout, join.model_fingerprint) == (first.layout, first.model_fingerprint):
            return None
        return (
            f"this engine's model ({join.model_fingerprint}, {join.layout}) is not the cluster's "
            f"({first.model_fingerprint}, {first.layout}); start it with the weights and dtype served now"
        )

    def _admit(self, link: EngineLink) -> None:
        join = link.join
        engine = self._links.admit(link)
        self._links.send(engine, m.Welcome(engine, self._links.epoch))
        if self._crew is not None:
            for ticket in filter(None, (join.ticket, join.agent_ticket)):
                self._crew.ready(ticket)
        self._members.engine_joined(
            EngineFacts(
                engine=engine,
                role=join.role,
                node=self._node_of(join, engine),
                group=0 if join.role is Role.PREFILL else 1,
                buffer_blocks=join.buffer_blocks,
                hbm_blocks=join.hbm_blocks,
                stages=bool(join.url) and join.role is Role.PREFILL,
            )
        )
        self._introduce(link)
        if self.status == "ok" and not self._complete.done():
            self._complete.set_result(None)

    def _node_of(self, join: m.Join, engine: EngineId) -> NodeId:
        """Returns the number of the engine's node: a node's first engine gives it its own."""
        return self._nodes.setdefault(join.node, engine) if join.node else engine

    def _introduce(self, newcomer: EngineLink) -> None:
        """Tell every prefill engine and every decode engine of each other, when one of the two is the newcomer."""
        for other in self._links.by_engine.values():
            pair = {newcomer.join.role: newcomer, other.join.role: other}
            if len(pair) == 2:
                prefill, decode = pair[Role.PREFILL], pair[Role.DECODE]
                assert prefill.engine is not None and decode.engine is not None
                self._links.send(decode.engine, m.PeerJoined(prefill.engine, prefill.join.data_address))
                self._links.send(prefill.engine, m.PeerJoined(decode.engine, decode.join.data_address))

    def lost(self, link: EngineLink, why: str, *, for_good: bool = False) -> None:
        """Remove an engine that may still run. If its process is local, kill it before anybody acts on the loss.

        One of another host may come back by itself, except `for_good`.
        """
        reason = f"no longer counted in: {why}"
        self._links.send_to(link.identity, m.Shutdown(reason) if for_good else m.NotMember(reason))
        if self._crew is not None:
            self._crew.kill(link.join.ticket)
            if self._agent_is_silent(link):
                self._crew.kill(link.join.agent_ticket)
        self.gone(link)

    def gone(self, link: EngineLink) -> None:
        """Remove an engine that surely touches no memory any more: it has said so, or its process is dead."""
        if link.engine is not None and not link.retired:
            self.lost_engines += 1
        self._remove(link)

    def _remove(self, link: EngineLink) -> None:
        self._links.forget(link)
        if link.engine is None:
            return
        for other in self._links.by_engine:
            self._links.send(other, m.PeerLost(link.engine, link.join.data_address))
        self._members.engine_lost(link.engine)

    def _agent_is_silent(self, link: EngineLink) -> bool:
        """Returns whether the node's agent says nothing, for no engine of its node: it then may still move bytes."""
        since_ns = time.monotonic_ns() - self._config.lease_ns
        agent = link.join.agent_ticket
        return bool(agent) and all(
            other.last_heard_ns < since_ns for other in self._links.all() if other.join.agent_ticket == agent
        )

    def process_died(self, ticket: str) -> None:
        """A local process has ended. What an engine held is its agent's to free, who then leaves for it."""
        for link in self._links.all():
            if ticket == (link.join.agent_ticket or link.join.ticket):
                self.gone(link)

    def hopeless(self, why: str) -> None:
        """A local engine can't start. That is the cluster's end when it can't serve without."""
        if not self._complete.done():
            self._complete.set_exception(RuntimeError(f"not all engines are ready, and {why}"))
        elif self.status == "unavailable":
            self._members.broken(RuntimeError(f"nobody serves, and {why}"))

    async def watch_leases(self) -> None:
        """Until cancelled, declare engines lost whose lease has expired.

        Silence counts only while this process listens: when it was held up itself, the leases are extended.
        """
        checked_ns = time.monotonic_ns()
        forgiving = False
        while True:
            await asyncio.sleep(self._config.heartbeat_ns / 1e9)
            now_ns = time.monotonic_ns()
            held_up_ns = now_ns - checked_ns - 2 * self._config.heartbeat_ns
            checked_ns = now_ns
            if held_up_ns > 0:
                self._links.extend_leases(held_up_ns)
                # Messages that came meanwhile are still unread. But a process that is always late must judge too.
                forgiving = not forgiving
                if forgiving:
                    continue
            forgiving = False
            for link in self._links.expired(now_ns, self._config.lease_ns):
                self.lost(link, f"silent for {self._config.lease_ns / 1e9:.1f} s")
