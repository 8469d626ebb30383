"""The coordinator's operator: pauses generation, changes the weights, clears the prefix cache, puts engines to sleep.

Weights change in two steps. Every engine first reads the checkpoint into host memory and checks it; the old weights
serve meanwhile, and an error on any engine ends the update there. Then generation is paused, and every engine copies
the new weights into place; an engine that can't is lost, so that no two versions ever serve. From then on block keys
are of another namespace, the weights' own: KV of other weights is never hit.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import msgspec

from dualpath.cluster import orders as o
from dualpath.cluster.coordinator.links import EngineLinks
from dualpath.cluster.coordinator.membership import Membership
from dualpath.cluster.coordinator.open_requests import OpenRequests
from dualpath.cluster.generator import Inflight, Memory, RequestError
from dualpath.core.vocabulary import EngineId
from dualpath.spec import metrics
from dualpath.spec.metrics import Figures

ORDER_S = 600.0
"""How long an engine may take for an order; reading weights from a network's storage takes long."""
DRAIN_POLL_S = 0.005


class _Order:
    """An order that was sent to all engines, until each has answered or is lost."""

    def __init__(self, engines: Collection[EngineId]) -> None:
        self.awaited = set(engines)
        self.answers: dict[EngineId, o.OrderDone] = {}
        self.complete = asyncio.Event()

    def settle(self, engine: EngineId) -> None:
        self.awaited.discard(engine)
        if not self.awaited:
            self.complete.set()


class Operator:
    """Implements `cluster.generator.Control`. One call at a time; the others wait."""

    def __init__(self, links: EngineLinks, membership: Membership, requests: OpenRequests, drain_s: float) -> None:
        self._links = links
        self._membership = membership
        self._requests = requests
        self._drain_s = drain_s
        self._turn = asyncio.Lock()
        self._orders: dict[int, _Order] = {}
        self._last_order = 0
        self._sleeping: frozenset[Memory] = frozenset()
        self._updates = 0

    # ── pausing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def paused(self) -> bool:
        return self._requests.parking.paused

    @property
    def requests(self) -> int:
        return len(self._requests)

    async def pause(self, inflight: Inflight) -> None:
        async with self._my_turn():
            await self._pause(inflight)

    async def resume(self) -> None:
        async with self._my_turn():
            self._refuse_asleep("kv_cache", "weights")
            await self._requests.resume()

    def abort(self, request_ids: Collection[str] | None) -> int:
        return self._requests.abort(request_ids)

    async def _pause(self, inflight: Inflight) -> None:
        """Pause, and wait until the engines are idle. If that takes too long, opens again and raises RequestError."""
        requests, was_paused = self._requests, self.paused
        requests.parking.paused = True
        if inflight == "abort":
            requests.abort(None)
        elif inflight == "keep":
            requests.suspend()
        try:
            async with asyncio.timeout(self._drain_s):
                while not requests.idle:
                    await asyncio.sleep(DRAIN_POLL_S)
        except TimeoutError:
            if not was_paused:
                await requests.resume()
            raise RequestError(
                504, "not_drained", f"running requests did not end within {self._drain_s:g} s; try abort or keep"
            ) from None

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(ORDER_S):
                await self._turn.acquire()
        except TimeoutError:
            raise RequestError(503, "control_busy", "another pause, update or sleep is in progress", 5.0) from None
        try:
            yield
        finally:
            self._turn.release()

    # ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def update_weights(self, path: str, version: str, inflight: Inflight) -> None:
        async with self._my_turn():
            self._refuse_asleep("weights")
            self._membership.closed = "the cluster's weights are being updated; start the engine again in a moment"
            try:
                await self._update(path, version, inflight)
            finally:
                self._membership.closed = ""

    async def _update(self, path: str, version: str, inflight: Inflight) -> None:
        fingerprint = await self._read(path)
        was_paused = self.paused
        try:
            await self._pause(inflight)
        except RequestError:
            await self._order(o.DropWeights)
            raise
        answers = await self._order(o.UseWeights)
        self._lose({engine: answer.error for engine, answer in answers.items() if answer.error})
        self._serve(fingerprint, path, version)
        if not was_paused:
            await self._requests.resume()
        if len(answers) == 0 or self._membership.status == "unavailable":
            raise RequestError(503, "no_engine", "engines were lost in the update; start others with the new weights")

    async def _read(self, path: str) -> str:
        """Have every engine read the checkpoint. Returns its fingerprint, the same on all; else forgets it again."""
        answers = await self._order(lambda order: o.ReadWeights(order, path))
        errors = [f"{self._name(engine)}: {answer.error}" for engine, answer in answers.items() if answer.error]
        fingerprints = {answer.fingerprint for answer in answers.values()}
        if errors or len(fingerprints) != 1:
            await self._order(o.DropWeights)
            why = errors[0] if errors else "engines read different weights, or there is none"
            raise RequestError(400, "weights_refused", f"the old weights still serve, everywhere. {why}")
        return fingerprints.pop()

    def _serve(self, fingerprint: str, path: str, version: str) -> None:
        requests = self._requests
        requests.prefixes.serve_weights(fingerprint)
        self._membership.serve_weights(fingerprint)
        requests.model = msgspec.structs.replace(requests.model, path=path, weight_version=version)
        self._updates += 1

    def _lose(self, engines: dict[EngineId, str]) -> None:
        """Count out engines that may have other weights than the rest."""
        for engine, why in engines.items():
            link = self._links.by_engine.get(engine)
            if link is not None:
                self._membership.lost(link, f"its weights are not the cluster's: {why}", for_good=True)

    async def reset_prefix_cache(self) -> None:
        self._requests.prefixes.forget()

    # ── sleep ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def sleeping(self) -> frozenset[Memory]:
        return self._sleeping

    async def sleep(self, memory: Collection[Memory], keep_weights: bool, inflight: Inflight) -> None:
        async with self._my_turn():
            await self._pause(inflight)
            tired = frozenset(memory) - self._sleeping
            self._sleeping |= tired
            weights, kv = "weights" in tired, "kv_cache" in tired
            answers = await self._order(lambda order: o.ReleaseMemory(order, weights, kv, keep_weights))
            errors = [f"{self._name(engine)}: {answer.error}" for engine, answer in answers.items() if answer.error]
            if errors:
                raise RequestError(503, "not_asleep", f"an engine gave no memory back; wake all up again. {errors[0]}")

    async def wake(self, memory: Collection[Memory]) -> None:
        async with self._my_turn():
            back = frozenset(memory) & self._sleeping
            model = self._requests.model
            weights, kv = "weights" in back, "kv_cache" in back
            answers = await self._order(lambda order: o.RestoreMemory(order, weights, kv, model.path))
            self._lose({engine: answer.error for engine, answer in answers.items() if answer.error})
            read = {engine: answer.fingerprint for engine, answer in answers.items() if answer.fingerprint}
            if read:  # the folder may have other weights by now than when they were given away
                fingerprint = next(iter(read.values()))
                self._lose({engine: "it read others" for engine, other in read.items() if other != fingerprint})
                self._serve(fingerprint, model.path, model.weight_version)
            self._sleeping -= back
            if not self._sleeping:
                await self._requests.resume()

    def _refuse_asleep(self, *memory: Memory) -> None:
        asleep = self._sleeping & set(memory)
        if asleep:
            raise RequestError(409, "asleep", f"{', '.join(sorted(asleep))} of the engines sleeps; call /wake_up first")

    # ── orders to engines ───────────────────────────────────────────────────────────────────────────────────────────

    async def _order(self, make: Callable[[int], o.EngineOrder]) -> dict[EngineId, o.OrderDone]:
        """Send an order to every engine. Returns each one's answer, without those that were lost meanwhile."""
        self._last_order += 1
        order = self._orders[self._last_order] = _Order(self._links.by_engine)
        for engine in order.awaited:
            self._links.send(engine, make(self._last_order))
        try:
            async with asyncio.timeout(ORDER_S):
                while order.awaited:
                    await order.complete.wait()
        except TimeoutError:
            for engine in order.awaited:
                order.answers[engine] = o.OrderDone(self._last_order, error=f"no answer within {ORDER_S:g} s")
        finally:
            del self._orders[self._last_order]
        return order.answers

    def on_answer(self, engine: EngineId, message: o.OrderDone) -> None:
        order = self._orders.get(message.order)
        if order is not None and engine in order.awaited:
            order.answers[engine] = message
            order.settle(engine)

    def engine_lost(self, engine: EngineId) -> None:
        for order in self._orders.values():
            order.answers.pop(engine, None)
            order.settle(engine)

    def _name(self, engine: EngineId) -> str:
        link = self._links.by_engine.get(engine)
        return link.name if link is not None else f"engine {engine}"

    def gauges(self) -> Figures:
        return {
            metrics.WEIGHTS_INFO(self._requests.model.weight_version): 1.0,
            metrics.WEIGHTS_UPDATES(): float(self._updates),
        }
