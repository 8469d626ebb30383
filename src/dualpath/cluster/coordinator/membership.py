"""Cluster membership: engines that join, engines that are refused, engines that are lost.

The first prefill engine *founds* the cluster. It reports the model and the speed of a PE, which the scheduler's
constants need; then the prefix index is read from storage. Engines that join earlier wait for this, and keep their
leases by heartbeats. All engines must have the same model and layout.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from dualpath.cluster import messages as m
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.links import EngineLink, EngineLinks
from dualpath.core.vocabulary import EngineFacts, EngineId, Role


class Members(Protocol):
    """What the coordinator does when membership changes."""

    def watch(self, task: "asyncio.Task[None]") -> None:
        """Own a task; if the task fails, the cluster fails."""
        ...

    async def found(self, join: m.Join, prefill_tokens_per_s: float) -> None: ...

    def engine_joined(self, facts: EngineFacts) -> None: ...

    def engine_lost(self, engine: EngineId) -> None: ...


class Membership:
    """Used from one asyncio thread. `kill_engine(pid)` ends a local process and returns once it is dead."""

    def __init__(
        self,
        config: ClusterConfig,
        links: EngineLinks,
        members: Members,
        kill_engine: Callable[[int], None] | None,
    ) -> None:
        self._config = config
        self._links = links
        self._members = members
        self._kill_engine = kill_engine
        self._first: m.Join | None = None
        self._founding: asyncio.Task[None] | None = None
        self._founded = False
        self.closed = ""
        """Why nobody may join at the moment; empty when engines may."""
        self.refused_engines = 0
        self.lost_engines = 0
        self._complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def complete(self, timeout_s: float) -> None:
        """Wait until every engine of the topology has joined.

        Raises TimeoutError that says how many have joined, RuntimeError when one ended before it joined.
        """
        try:
            await asyncio.wait_for(asyncio.shield(self._complete), timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"after {timeout_s:.0f} s {self.count(Role.PREFILL)} prefill and {self.count(Role.DECODE)} decode "
                f"engines of {self._config.topology} have joined; see the engines' messages above"
            ) from None

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
        return topology.prefill_nodes if role is Role.PREFILL else topology.decode_nodes

    def join(self, identity: bytes, join: m.Join) -> None:
        """Admit, refuse or hold an engine that asks to join."""
        refusal = self._refusal(join)
        if refusal is not None:
            self.refused_engines += 1
            self._links.send_to(identity, m.Refusal(refusal))
            return
        self._first = self._first or join
        link = self._links.expect(identity, join)
        if self._founded:
            self._admit(link)
        elif self._founding is None and join.prefill_tokens_per_s is not None:
            self._founding = asyncio.create_task(self._found(join, join.prefill_tokens_per_s))
            self._members.watch(self._founding)

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
        first = self._first
        if first is None or (join.layout, join.model_fingerprint) == (first.layout, first.model_fingerprint):
            return None
        return (
            f"this engine's model ({join.model_fingerprint}, {join.layout}) is not the cluster's "
            f"({first.model_fingerprint}, {first.layout}); start it with the weights and dtype served now"
        )

    def _admit(self, link: EngineLink) -> None:
        join = link.join
        engine = self._links.admit(link)
        self._links.send(engine, m.Welcome(engine))
        self._members.engine_joined(
            EngineFacts(
                engine=engine,
                role=join.role,
                node=engine,  # one engine per node here: each has its own SNIC and CNIC
                group=0 if join.role is Role.PREFILL else 1,
                buffer_blocks=join.buffer_blocks,
                hbm_blocks=join.hbm_blocks,
            )
        )
        self._introduce(link)
        if self.status == "ok" and not self._complete.done():
            self._complete.set_result(None)

    def _introduce(self, newcomer: EngineLink) -> None:
        """Tell every prefill engine about every decode engine, when one of the two is the newcomer."""
        for other in self._links.by_engine.values():
            pair = {newcomer.join.role: newcomer, other.join.role: other}
            if len(pair) == 2:
                prefill, decode = pair[Role.PREFILL].engine, pair[Role.DECODE].engine
                assert prefill is not None and decode is not None
                self._links.send(prefill, m.PeerJoined(decode, pair[Role.DECODE].join.data_address))

    def lost(self, link: EngineLink, why: str) -> None:
        """Remove an engine that may still run. If its process is local, kill it before anybody acts on the loss."""
        self._links.send_to(link.identity, m.Shutdown(f"no longer counted in: {why}"))
        if self._kill_engine is not None:
            self._kill_engine(link.join.pid)
        self.gone(link)

    def gone(self, link: EngineLink) -> None:
        """Remove an engine that surely touches no memory any more: it has said so, or its process is dead."""
        self._links.forget(link)
        if link.engine is None:
            return
        self.lost_engines += 1
        for other in self._links.by_engine:
            self._links.send(other, m.PeerLost(link.engine, link.join.data_address))
        self._members.engine_lost(link.engine)

    def process_died(self, pid: int, why: str) -> None:
        """A local engine process has ended, before or after it joined."""
        for link in self._links.all():
            if link.join.pid == pid:
                self.gone(link)
        if not self._complete.done():
            self._complete.set_exception(RuntimeError(f"not all engines are ready, and {why}"))

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
