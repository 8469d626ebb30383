"""The coordinator: it controls a cluster's engines and answers the cluster's server.

Theory of operation. Everything here runs on one asyncio thread. `Membership` admits engines and proves that a lost
engine is gone. The first prefill engine to join says which model is served. From then on, `Serving` holds the clients'
requests, and `SchedulerDriver` drives core, which decides everything: which engine, which path, when to retry or to
give up. This file connects them: it listens, starts serving, answers the server, and stops. Read `serving` next.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from dualpath.cluster import messages as m
from dualpath.cluster import orders as o
from dualpath.cluster.cluster_secret import ClusterSecret
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.driver import SchedulerDriver, scheduler_constants, scheduler_limits
from dualpath.cluster.coordinator.kv_events import KVEvents
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.coordinator.membership import Crew, Membership
from dualpath.cluster.coordinator.open_requests import OpenRequests
from dualpath.cluster.coordinator.operator import Operator
from dualpath.cluster.coordinator.parking import Parking
from dualpath.cluster.coordinator.prefixes import Prefixes
from dualpath.cluster.coordinator.retiring import retire
from dualpath.cluster.coordinator.router_figures import router_figures
from dualpath.cluster.coordinator.served_model import served_model
from dualpath.cluster.coordinator.serving import Serving
from dualpath.cluster.coordinator.store_health import StoreHealth
from dualpath.cluster.generator import (
    Control,
    GeneratedTokens,
    GenerateRequest,
    Handoff,
    ModelFacts,
    RequestError,
    VllmServer,
)
from dualpath.core.counts import figures as scheduler_figures
from dualpath.core.ledger import Holding
from dualpath.core.scheduler import Scheduler
from dualpath.core.vocabulary import EngineFacts, EngineId
from dualpath.kv.keys import BlockKey
from dualpath.kv.layout import KVLayout
from dualpath.spec import metrics
from dualpath.spec.log import ROOT
from dualpath.spec.metrics import Figures
from dualpath.spec.timings import Timings

logger = logging.getLogger(f"{ROOT}.cluster")

FLUSH_S = 0.05
"""How long the last messages to engines may take before the control socket closes."""


class Coordinator:
    """Controls one cluster. Implements `cluster.generator.Generator`, and `Router` where engines are vLLM servers.

    Whoever starts local engines is the `crew`. `control` listens at the control address already, if somebody holds it.
    `weights` (path, version) are those that a coordinator before has served at last.
    """

    def __init__(
        self,
        config: ClusterConfig,
        crew: Crew | None = None,
        control: socket.socket | None = None,
        weights: tuple[str, str] | None = None,
    ) -> None:
        """Raises OSError when it cannot listen at the control address or cannot write the journal, ValueError when the
        model's generation_config.json makes no sense."""
        self._config = config
        self._crew = crew
        self._first_weights = weights or (config.model, config.weights_version or "default")
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception when the coordinator itself breaks: it must then stop, because its state can no longer
        be trusted.
        """
        config.generation_defaults()  # what is wrong with the file is said before engines start
        self._driver = SchedulerDriver(self.broken, config.journal)
        self._links = EngineLinks(config.cluster_secret or ClusterSecret.random())
        self.membership = Membership(config, self._links, self, crew)
        self.control_address = self._links.bind(config.control_address, control)
        self._events = KVEvents(config.kv_events if config.kv_events and config.kv_events.enabled else None)
        self.layout: KVLayout | None = None
        self._serving: Serving | None = None
        self._operator: Operator | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.strange_messages = 0
        """Messages from engines that have not joined or are lost."""

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start to listen; `membership.complete` waits for the engines of the configured topology."""
        self.watch(asyncio.create_task(self._listen()))
        self.watch(asyncio.create_task(self.membership.watch_leases()))

    async def stop(self, *, keep_engines: bool = False) -> None:
        """Tell engines to leave, end open requests, and close. Engines that are kept wait for another coordinator."""
        self._driver.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links.all() if not keep_engines else ():
            self._links.send_to(link.identity, m.Shutdown("the cluster stops"))
        if self._serving is not None:
            error = RequestError(503, "shutting_down", "the server is shutting down; try again later", 5.0)
            self._serving.requests.end_all(error)
        await asyncio.sleep(FLUSH_S)
        self._links.close()
        if self._serving is not None:
            await asyncio.to_thread(self._serving.requests.prefixes.close)
        await self._events.close()

    def watch(self, task: "asyncio.Task[None]") -> None:
        """Own a task until `stop`; if the task fails, the coordinator fails."""
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.broken(error)

    def broken(self, error: BaseException) -> None:
        """Note that this coordinator can't go on."""
        if not self.failure.done():
            self.failure.set_exception(error)
            self.failure.exception()  # mark it as seen: the caller may stop us without looking at it

    # ── the server's face ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model(self) -> ModelFacts:
        return self._founded.requests.model

    @property
    def weights(self) -> tuple[str, str]:
        """The path of the checkpoint that is served now, and its version."""
        return (self.model.path, self.model.weight_version) if self._serving is not None else self._first_weights

    @property
    def control(self) -> Control:
        assert self._operator is not None, "no prefill engine has joined yet"
        return self._operator

    @property
    def _founded(self) -> Serving:
        assert self._serving is not None, "no prefill engine has joined yet"
        return self._serving

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GeneratedTokens, None]:
        """See `cluster.generator.Generator.generate`."""
        return self._stream(request, routed=False)

    def route(self, request: GenerateRequest) -> AsyncGenerator[Handoff | GeneratedTokens, None]:
        """See `cluster.generator.Router.route`."""
        return self._stream(request, routed=True)

    async def _stream(self, request: GenerateRequest, routed: bool) -> AsyncGenerator[Any, None]:
        if self._serving is None:
            raise RequestError(503, "no_engine", "no engine has joined yet; try again in a moment", 1.0)
        if routed is not self.membership.of_vllm:
            whose = "vLLM servers: send requests to their router" if self.membership.of_vllm else "no vLLM servers"
            raise RequestError(501, "wrong_engine", f"this cluster's engines are {whose}")
        async with aclosing(self._serving.stream(request, routed)) as events:
            async for event in events:
                yield event

    def hand_off_failed(self, owner: tuple[int, int], why: str) -> None:
        """See `cluster.generator.Router.hand_off_failed`."""
        self._founded.hand_off_failed(owner, why)

    def answered(self, owner: tuple[int, int]) -> Timings | None:
        """See `cluster.generator.Router.answered`."""
        return self._founded.answered(owner)

    def vllm_servers(self) -> list[VllmServer]:
        """See `cluster.generator.Router.vllm_servers`."""
        return self._links.vllm_servers()

    # ── for those who look inside (tests, tools) ────────────────────────────────────────────────────────────────────

    def scheduler_holdings(self) -> tuple[Holding, ...]:
        """Returns the holdings in core's ledger; empty when the cluster is idle."""
        return self._driver.held()

    def block_key(self, prompt_token_ids: list[int], block: int, tenant: str = "") -> BlockKey:
        """Returns the key of full block number `block` of a prompt."""
        prefixes = self._founded.requests.prefixes
        return prefixes.keys(prefixes.namespace_of(tenant), prompt_token_ids)[block]

    async def settle(self) -> None:
        """Wait until file work queued so far is done."""
        await self._founded.requests.prefixes.settle()

    def health(self) -> dict[str, object]:
        """See `cluster.generator.Generator.health`."""
        starting = self._crew.starting() if self._crew is not None else []
        store, status = self._store_health(), self.membership.status
        if status == "ok" and not store.ok:
            status = "degraded"
        return {"status": status, "store": store.facts(), "engines": self.engines(), "starting": starting}

    def _store_health(self) -> StoreHealth:
        own = self._serving.requests.prefixes.troubles_s() if self._serving is not None else {}
        return StoreHealth.of(own, ((link.name, link.gauges) for link in self._links.by_engine.values()))

    def engines(self) -> list[dict[str, object]]:
        """Returns the engines that have joined, for people."""
        return [link.for_people() for link in self._links.by_engine.values()]

    def gauges(self) -> Figures:
        """See `cluster.generator.Generator.gauges`."""
        figures: Figures = {
            metrics.STRANGE_MESSAGES(): float(self.strange_messages),
            metrics.MALFORMED_MESSAGES(): float(self._links.malformed_messages),
            metrics.CONTROL_REFUSED(): float(self._links.door.refused_connections),
            metrics.UNROUTABLE_MESSAGES(): float(self._links.unroutable_messages),
            metrics.ENGINES_REFUSED(): float(self.membership.refused_engines),
            metrics.ENGINES_LOST(): float(self.membership.lost_engines),
            metrics.ENGINES_RETURNED(): float(self.membership.returned_engines),
            metrics.PARTS_RESTARTED(): float(self._crew.restarts if self._crew is not None else 0),
            **scheduler_figures(self._driver.statistics()),
            **self._store_health().gauges(),
        }
        if self._serving is not None:
            figures |= self._serving.gauges() | self._router_figures(self.model.name)
        if self._operator is not None:
            figures |= self._operator.gauges()
        for link in self._links.by_engine.values():
            assert link.engine is not None
            for sample, figure in link.gauges.items():
                figures[metrics.of_engine(sample, link.engine, link.join.role.value)] = figure
        return figures

    def _router_figures(self, model: str) -> Figures:
        config, statistics, blocks = self._config, self._driver.statistics(), self._links.device_blocks()
        return router_figures(model, config.dtype, config.prefix_cache, statistics, self._driver.held(), blocks)

    # ── membership ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def found(self, join: m.Join, prefill_tokens_per_s: float) -> None:
        """Make the scheduler and the prefix index, with the model and the speed that the first prefill engine reports.

        Raises StoreError or OSError when the store cannot be read.
        """
        config = self._config
        prefixes = Prefixes(
            config.store,
            join.layout,
            join.model_fingerprint,
            config.weights_version,
            config.store_quota_bytes,
            self._events,
            timeout_s=config.store_timeout_s,
        )
        await prefixes.load()
        model = served_model(config, join, *self._first_weights)
        self.layout = join.layout
        constants = scheduler_constants(config, join.layout, prefill_tokens_per_s)
        scheduler = Scheduler(config.policy, constants, scheduler_limits(config))
        deadline_s = config.request_deadline_ns / 1e9
        parking = Parking(config.max_waiting, deadline_s)
        requests = OpenRequests(model, prefixes, self._driver, config.prefix_cache, parking)
        self._serving = Serving(requests, self._links, self._driver, scheduler)
        self._operator = Operator(self._links, self.membership, requests, deadline_s)

    def engine_joined(self, facts: EngineFacts) -> None:
        joined, topology = self._links.by_engine, self._config.topology
        name = joined[facts.engine].join.name or joined[facts.engine].name
        logger.info("%d of %d engines ready: %s has joined", len(joined), topology.engines, name)
        self._driver.input(lambda s, now: s.engine_joined(now, facts))

    async def retire(self, ticket: str) -> str:
        """See `retiring.retire`."""
        return await retire(self._links, self._driver, ticket, self._config.request_deadline_ns / 1e9)

    def engine_lost(self, engine: EngineId) -> None:
        self._driver.input(lambda s, now: s.engine_lost(now, engine))
        if self._operator is not None:
            self._operator.engine_lost(engine)

    async def _listen(self) -> None:
        async for identity, message in self._links.messages():
            link = self._links.link_of(identity)
            if isinstance(message, m.Join):
                if link is None:
                    self.membership.join(identity, message)
            elif link is None or link.engine is None:
                self.strange_messages += 1
            elif isinstance(message, m.Leave):
                self.membership.gone(link)
            elif isinstance(message, o.OrderDone) and self._operator is not None:
                self._operator.on_answer(link.engine, message)
            else:
                self._founded.on_message(link.engine, message)
