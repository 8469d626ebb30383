"""The requests that have not ended: those that core knows, and those that wait while generation is paused.

A request enters with its prompt matched against storage, and leaves with its last event. In between, a pause may take
it off the engines. It then enters again later, as a new request of core's; what it has generated is part of the prompt.
"""

import asyncio
import time
from collections.abc import Collection

from dualpath.cluster.coordinator.driver import SchedulerDriver
from dualpath.cluster.coordinator.live_request import LiveRequest
from dualpath.cluster.coordinator.parking import Parking
from dualpath.cluster.coordinator.prefixes import Prefixes
from dualpath.cluster.coordinator.refusals import check_request
from dualpath.cluster.generator import GenerateRequest, ModelFacts, RequestError
from dualpath.core.vocabulary import BLOCK_TOKENS, RequestFacts, RequestId
from dualpath.kv import BlockKey


class OpenRequests:
    """Used from one asyncio thread."""

    def __init__(
        self, model: ModelFacts, prefixes: Prefixes, driver: SchedulerDriver, prefix_cache: bool, parking: Parking
    ) -> None:
        self.model = model
        self.prefixes = prefixes
        self.parking = parking
        self.running: dict[RequestId, LiveRequest] = {}
        """Those that core knows."""
        self._driver = driver
        self._prefix_cache = prefix_cache
        self._next_request: RequestId = 0
        self._over: RequestError | None = None

    def __len__(self) -> int:
        return len(self.running) + len(self.parking)

    async def submit(self, asked: GenerateRequest, routed: bool = False) -> LiveRequest:
        live = LiveRequest(asked, time.monotonic_ns(), routed)
        check_request(asked, self.model)
        await self._enter(live)
        return live

    async def _enter(self, live: LiveRequest) -> None:
        """Give a request to the scheduler, or park it. Raises RequestError when it can't be served."""
        asked, prompt = live.asked, live.asked.prompt_token_ids + live.generated
        while not self.parking.paused:
            space = self.prefixes.namespace_of(asked.tenant)
            keys = self.prefixes.keys(space, prompt)
            if self._prefix_cache:
                await self.prefixes.look_beyond(space, keys[: _most_hit_blocks(prompt)])
            if space == self.prefixes.namespace_of(asked.tenant):  # the weights have not changed meanwhile
                break
        if self._over is not None:
            raise self._over
        if live.ended:
            return
        if self.parking.paused:
            self.parking.add(live)
            return
        live.enter(self._next_request, space)
        self._next_request += 1
        facts = self.begin(live, 0, keys)
        self.running[live.request] = live
        self._driver.input(lambda s, now: s.submit(now, facts))

    def cancel(self, live: LiveRequest) -> None:
        """Cancel a request whose client has gone; nothing happens if it has ended already."""
        live.ended |= not self._is_running(live)
        if not self.parking.remove(live) and self._is_running(live):
            self._driver.input(lambda s, now: s.cancel(now, live.request))

    def abort(self, request_ids: Collection[str] | None) -> int:
        """See `cluster.generator.Control.abort`."""
        chosen = [
            live
            for live in (*self.running.values(), *self.parking)
            if request_ids is None or live.asked.request_id in request_ids
        ]
        for live in chosen:
            if self.parking.remove(live):
                live.end("abort")
            else:
                self.give_up(live, live.reason or "abort")
        return len(chosen)

    def suspend(self) -> None:
        """Take every request off the engines and park it, with the tokens that it has; one that has all is let end.

        So is one that a vLLM server may be answering already.
        """
        for live in list(self.running.values()):
            if live.reason is None and live.owner is None:
                del self.running[live.request]
                self.prefixes.unpin(live.request)
                live.leave()
                self.parking.add(live)
                self._driver.input(lambda s, now, request=live.request: s.cancel(now, request))  # type: ignore[misc]

    @property
    def idle(self) -> bool:
        """True when no engine has anything of a request in hand."""
        return not self.running and not self._driver.held()

    async def resume(self) -> None:
        """Serve again: first those that waited, in their order."""
        self.parking.paused = False
        waiting = [live for live in self.parking if self.parking.remove(live)]
        await asyncio.gather(*map(self._enter_again, waiting))

    async def _enter_again(self, live: LiveRequest) -> None:
        try:
            await self._enter(live)
        except RequestError as error:
            live.end(error)

    def _is_running(self, live: LiveRequest) -> bool:
        return live.current is not None and self.running.get(live.request) is live

    def end_all(self, error: RequestError) -> None:
        """End every request with `error`, later ones too."""
        self._over = error
        for live in list(self.running.values()):
            self.end(live, error)
        for live in self.parking:
            self.parking.remove(live)
            live.end(error)

    def begin(self, live: LiveRequest, attempt: int, keys: list[BlockKey] | None = None) -> RequestFacts:
        """Match the prompt, plus generated tokens, against storage, and pin the hit blocks for this attempt."""
        prompt = live.asked.prompt_token_ids + live.generated
        if keys is None:
            keys = self.prefixes.keys(live.namespace, prompt)
        self.prefixes.unpin(live.request)
        hit_blocks = 0
        # A hit gives KV and no logits, so a prompt that is scored is computed.
        if self._prefix_cache and not live.recompute and not live.scores_prompt:
            hit_blocks = self.prefixes.match_and_pin(live.request, keys, _most_hit_blocks(prompt))
        return live.begin(attempt, prompt, keys, hit_blocks)

    def give_up(self, live: LiveRequest, outcome: str | RequestError) -> None:
        """End a request that core has not ended: core then takes it off the engines."""
        self.end(live, outcome)
        self._driver.input(lambda s, now: s.cancel(now, live.request))

    def end(self, live: LiveRequest, outcome: str | RequestError) -> None:
        if self.running.pop(live.request, None) is None:
            return
        self.prefixes.unpin(live.request)
        live.end(outcome)


def _most_hit_blocks(prompt: list[int]) -> int:
    """Returns the most blocks that may hit: one prompt token or more is computed, for the first token's logits."""
    return (len(prompt) - 1) // BLOCK_TOKENS
