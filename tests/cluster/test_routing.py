"""Requests that vLLM servers answer, as their router sees them: hand-offs, retries, the end. The test is every one."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, Handoff, RequestError, VllmServer
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.topology import Topology

from .fake_engine import FakeEngine, Head, head
from .test_request_life import PROMPT, stored

REASON = "stop"


class Routed:
    """One prefill and two decode servers, and a router's stream."""

    def __init__(self, cluster: Head, prefill: FakeEngine, decodes: list[FakeEngine]) -> None:
        self.cluster = cluster
        self.prefill = prefill
        self.decodes = decodes
        self.got: list[Handoff | GeneratedTokens] = []
        self.router: asyncio.Task[None]

    def ask(self, max_tokens: int = 100) -> None:
        request = GenerateRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=max_tokens))

        async def listen() -> None:
            async for event in self.cluster.coordinator.route(request):
                self.got.append(event)

        self.router = asyncio.create_task(listen())

    async def decode_of(self, attempt: int) -> FakeEngine:
        """The engine that is to decode an attempt, which has been told to prepare."""
        async with asyncio.timeout(10.0):
            while True:
                for engine in self.decodes:
                    if any(one.attempt == attempt for one in engine.all(m.PrepareDecode)):
                        return engine
                await asyncio.sleep(0.002)

    async def prefilled(self, attempt: int) -> tuple[FakeEngine, m.StartPrefill]:
        """The prompt's KV reaches a decode engine."""
        decode = await self.decode_of(attempt)
        prepare = decode.all(m.PrepareDecode)[-1]
        decode.say(m.Prepared(prepare.request, attempt, [0, 1, 2, 3]))
        if prepare.hit_tokens:
            await self.prefill.hears(m.LoadLeg, attempt + 1)
            self.prefill.say(m.Loaded(prepare.request, attempt, Side.PE))
        start = await self.prefill.hears(m.StartPrefill, attempt + 1)
        self.prefill.say(m.PrefillDone(start.request, attempt, None))
        return decode, start

    async def handed_off(self, n: int = 1) -> Handoff:
        async with asyncio.timeout(10.0):
            while len(self.got) < n:
                assert not self.router.done(), self.router
                await asyncio.sleep(0.002)
        event = self.got[n - 1]
        assert isinstance(event, Handoff)
        return event

    def release(self, owner: tuple[int, int], *engines: FakeEngine) -> None:
        for engine in engines:
            engine.say(m.Released(*owner))


def url(role: Role, number: int) -> dict[str, object]:
    return {"url": f"http://127.0.0.1:{role.value}{number}", "model": "m", "name": f"{role.value}-{number}"}


def routed(store: Path, work: Callable[[Routed], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        defaults = {"lease_ns": 60_000_000_000, "topology": Topology(1, 2), "system": "basic-layerwise"}
        async with head(store, **(defaults | settings)) as cluster:
            prefill = await cluster.new(Role.PREFILL).join(**url(Role.PREFILL, 0))
            decodes = [await cluster.new(Role.DECODE).join(**url(Role.DECODE, n), dp_rank=n) for n in range(2)]
            await work(Routed(cluster, prefill, decodes))
            await cluster.becomes("dualpath_requests_live", 0)
            await cluster.becomes("dualpath_store_pinned_blocks", 0)
            async with asyncio.timeout(10.0):
                while cluster.coordinator.scheduler_holdings():
                    await asyncio.sleep(0.002)

    asyncio.run(run())


def test_a_hit_request_is_handed_to_the_server_that_has_its_kv(tmp_path: Path) -> None:
    stored(tmp_path, 2)

    async def work(at: Routed) -> None:
        at.ask()
        decode, start = await at.prefilled(0)
        assert (start.hit_token_ids, start.miss_token_ids) == (PROMPT[:128], PROMPT[128:])
        told = await decode.hears(m.StartDecode)
        assert (told.draw, told.tail_token_ids) == (None, PROMPT[192:])
        handoff = await at.handed_off()
        number = at.decodes.index(decode)
        assert handoff == Handoff(
            **{name: url(Role.DECODE, number)[name] for name in ("url", "model")},  # type: ignore[arg-type]
            dp_rank=number,
            owner=(start.request, 0),
            cached_tokens=128,
        )
        first = at.cluster.coordinator.answered(handoff.owner)
        last = at.cluster.coordinator.answered(handoff.owner)
        assert first is not None and last is not None
        assert (first.decode_s, first.pe_read_tokens, first.attempts, first.prefill_engine) == (0.0, 128, 1, "PE0")
        assert last.decode_s > 0 and last.prefill_s == first.prefill_s
        assert not at.router.done()
        decode.say(m.BufferFreed(start.request, 0, 4))
        decode.say(m.Finished(start.request, 0, "length"))
        await at.router
        end = at.got[1]
        assert isinstance(end, GeneratedTokens)
        assert (end.token_ids, end.finish_reason, end.cached_tokens, end.timings) == ([], "length", 128, last)

    routed(tmp_path, work)


def test_a_server_that_does_not_answer_is_not_asked_again(tmp_path: Path) -> None:
    """The next attempt has the client's prompt, and keeps away from that server, although it has most room."""

    async def work(at: Routed) -> None:
        at.ask()
        failed, start = await at.prefilled(0)
        handoff = await at.handed_off()
        at.cluster.coordinator.hand_off_failed(handoff.owner, "HTTP 500")
        await failed.hears(m.AbortAttempt)
        at.release(handoff.owner, failed)
        decode, again = await at.prefilled(1)
        assert decode is not failed
        assert again.miss_token_ids == PROMPT
        second = await at.handed_off(2)
        assert (second.owner, second.url) != (handoff.owner, handoff.url)
        at.cluster.coordinator.hand_off_failed(handoff.owner, "late")
        assert at.cluster.coordinator.answered(handoff.owner) is None  # it answers after all: dropped
        timings = at.cluster.coordinator.answered(second.owner)
        assert timings is not None and timings.attempts == 2
        decode.say(m.Finished(start.request, 1, REASON))
        await at.router

    routed(tmp_path, work)


def test_an_attempt_that_a_client_has_seen_is_not_retried(tmp_path: Path) -> None:
    async def work(at: Routed) -> None:
        at.ask()
        decode, start = await at.prefilled(0)
        handoff = await at.handed_off()
        at.cluster.coordinator.answered(handoff.owner)
        decode.say(m.AttemptFailed(start.request, 0, Cause.COMPUTE_FAILED, "its agent's disk is gone"))
        await decode.hears(m.AbortAttempt)
        at.release(handoff.owner, decode)
        with pytest.raises(RequestError) as caught:
            await at.router
        assert (caught.value.status, caught.value.code) == (503, "compute_failed")

    routed(tmp_path, work)


def test_a_router_that_stops_listening_cancels(tmp_path: Path) -> None:
    async def work(at: Routed) -> None:
        at.ask()
        decode, _ = await at.prefilled(0)
        handoff = await at.handed_off()
        at.router.cancel()
        await decode.hears(m.AbortAttempt)
        at.release(handoff.owner, decode)
        assert at.cluster.coordinator.answered(handoff.owner) is None

    routed(tmp_path, work)


def test_a_pause_parks_what_no_server_answers_yet(tmp_path: Path) -> None:
    async def work(at: Routed) -> None:
        at.ask()
        decode, start = await at.prefilled(0)
        handoff = await at.handed_off()
        control = at.cluster.coordinator.control
        pausing = asyncio.create_task(control.pause("keep"))
        await asyncio.sleep(0.05)
        assert not pausing.done() and not decode.all(m.AbortAttempt)
        assert at.cluster.coordinator.answered(handoff.owner) is not None
        decode.say(m.Finished(start.request, 0, REASON))
        await pausing
        await at.router
        await control.resume()

    routed(tmp_path, work)


def test_reports_that_a_vllm_server_can_not_make(tmp_path: Path) -> None:
    async def work(at: Routed) -> None:
        at.ask()
        decode = await at.decode_of(0)
        request = decode.all(m.PrepareDecode)[0].request
        decode.say(m.Prepared(request, 0, [0, 1, 2, 3]))
        await at.prefill.hears(m.StartPrefill)
        at.prefill.say(m.PrefillDone(request, 0, m.Draw(5)))
        at.prefill.say(m.PrefillDone(request, 0, None))
        at.prefill.say(m.PrefillDone(request, 0, None))
        decode.say(m.Tokens([m.StepTokens(request, 0, m.Draw(5))]))
        await at.handed_off()
        await at.cluster.becomes("dualpath_foreign_messages_total", 3)
        decode.say(m.Finished(request, 0, REASON))
        await at.router

    routed(tmp_path, work)


def test_engines_of_two_kinds_do_not_mix(tmp_path: Path) -> None:
    async def work(at: Routed) -> None:
        assert at.cluster.coordinator.vllm_servers()[0] == VllmServer(
            url="http://127.0.0.1:prefill0", model="m", dp_rank=None, role=Role.PREFILL
        )
        assert [one.dp_rank for one in at.cluster.coordinator.vllm_servers()] == [None, 0, 1]
        stranger = at.cluster.new(Role.DECODE)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await stranger.join()
        assert "an engine of our own" in stranger.all(m.Refusal)[0].reason
        request = GenerateRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=1))
        with pytest.raises(RequestError) as caught:
            await anext(at.cluster.coordinator.generate(request))
        assert caught.value.code == "wrong_engine"

    routed(tmp_path, work)
