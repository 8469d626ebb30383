"""Where a request's time went: the coordinator's stamps, on a clock that the test sets, engine by engine."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest
from dualpath.cluster.local import Cluster
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.timings import Timings

from .conftest import cluster_config, in_cluster
from .fake_engine import LAYOUT, FakeEngine, Head, head
from .test_request_life import PROMPT, stored


class Clock:
    """Stands in for the `time` module where stages are stamped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0
        for module in ("attempt", "live_request", "open_requests"):
            monkeypatch.setattr(f"dualpath.cluster.coordinator.{module}.time", self)

    def monotonic_ns(self) -> int:
        return self.now_s * 10**9


class Stage:
    """One client, its engines and the clock."""

    def __init__(self, cluster: Head, clock: Clock, prefill: FakeEngine, decode: FakeEngine) -> None:
        self.cluster = cluster
        self.clock = clock
        self.prefill = prefill
        self.decode = decode
        self.got: list[GeneratedTokens] = []

    async def ask(self, max_tokens: int = 3) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = GenerateRequest(prompt_token_ids=PROMPT, sampling=sampling)
        async for step in self.cluster.coordinator.generate(request):
            self.got.append(step)

    async def gets(self, steps: int) -> None:
        async with asyncio.timeout(10.0):
            while len(self.got) < steps:
                await asyncio.sleep(0.002)

    async def settles(self) -> None:
        """What engines have said is heard before the clock moves on."""
        await asyncio.sleep(0.05)

    async def prefilled(self, attempt: int, token: int) -> None:
        start = await self.prefill.hears(m.StartPrefill, attempt + 1)
        self.prefill.say(m.PrefillDone(start.request, attempt, m.Draw(token)))


def on_stage(
    store: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Stage], Awaitable[None]], **settings: object
) -> None:
    async def run() -> None:
        async with head(store, **({"lease_ns": 60_000_000_000} | settings)) as cluster:
            engines = [await cluster.new(role).join() for role in (Role.PREFILL, Role.DECODE)]
            await work(Stage(cluster, Clock(monkeypatch), *engines))

    asyncio.run(run())


def test_every_stage_of_a_hit_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, 2)

    async def work(stage: Stage) -> None:
        client = asyncio.create_task(stage.ask())
        prepare = await stage.decode.hears(m.PrepareDecode)
        await stage.prefill.hears(m.LoadLeg)
        stage.clock.now_s = 10
        stage.decode.say(m.Prepared(prepare.request, 0, [0, 1, 2, 3]))
        await stage.settles()
        stage.clock.now_s = 30
        stage.prefill.say(m.Loaded(prepare.request, 0, Side.PE))
        await stage.prefill.hears(m.StartPrefill)
        stage.clock.now_s = 70
        await stage.prefilled(0, 50)
        await stage.gets(1)
        await stage.decode.hears(m.StartDecode)
        for now_s, token in ((80, 51), (90, 52)):
            stage.clock.now_s = now_s
            stage.decode.say(m.Tokens([m.StepTokens(prepare.request, 0, m.Draw(token))]))
            await stage.gets(len(stage.got) + 1)
        stage.clock.now_s = 200
        stage.decode.say(m.Finished(prepare.request, 0, "length"))
        await client
        first, _, _, last = (step.timings for step in stage.got)
        assert first is not None and first.decode_s == 0
        assert last == Timings(
            scheduling_s=0,
            allocation_s=10,
            read_s=20,
            prefill_s=40,
            decode_s=20,  # to the last token, not to the end of persisting
            prefill_engine="PE0",
            decode_engine="DE0",
            pe_read_tokens=128,
            de_read_tokens=0,
            kv_read_bytes=128 * LAYOUT.kv_bytes.bytes_per_token,
            attempts=1,
        )

    on_stage(tmp_path, monkeypatch, work, system="basic-layerwise")


def test_what_was_read_before_the_buffer_was_ready_costs_no_time_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(tmp_path, 2)

    async def work(stage: Stage) -> None:
        client = asyncio.create_task(stage.ask(max_tokens=1))
        prepare = await stage.decode.hears(m.PrepareDecode)
        load = await stage.decode.hears(m.LoadLeg)
        stage.clock.now_s = 5
        stage.decode.say(m.Loaded(load.request, 0, Side.DE))
        await stage.settles()
        stage.clock.now_s = 9
        stage.decode.say(m.Prepared(prepare.request, 0, [0, 1, 2, 3]))
        await stage.prefill.hears(m.StartPrefill)
        stage.clock.now_s = 10
        await stage.prefilled(0, 50)
        await stage.decode.hears(m.StartDecode)
        stage.decode.say(m.Finished(prepare.request, 0, "length"))
        await client
        timings = stage.got[-1].timings
        assert timings is not None
        assert (timings.allocation_s, timings.read_s, timings.prefill_s) == (9, 0, 1)
        assert (timings.pe_read_tokens, timings.de_read_tokens) == (0, 128)

    on_stage(tmp_path, monkeypatch, work, system="de-only")


@pytest.mark.parametrize("lost_after_first_token", [False, True])
def test_stages_are_of_the_attempt_that_gave_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_after_first_token: bool
) -> None:
    """They add up to the time to first token whichever attempt failed."""

    async def work(stage: Stage) -> None:
        client = asyncio.create_task(stage.ask(max_tokens=2))
        prepare = await stage.decode.hears(m.PrepareDecode)
        stage.decode.say(m.Prepared(prepare.request, 0, [0, 1, 2, 3]))
        await stage.prefill.hears(m.StartPrefill)
        stage.clock.now_s = 100
        if lost_after_first_token:
            await stage.prefilled(0, 50)
            await stage.decode.hears(m.StartDecode)
        stage.decode.say(m.AttemptFailed(prepare.request, 0, Cause.COMPUTE_FAILED, "broken"))
        if not lost_after_first_token:
            await stage.prefill.hears(m.AbortAttempt)
            stage.prefill.say(m.Released(prepare.request, 0))
        await stage.decode.hears(m.AbortAttempt)
        stage.decode.say(m.Released(prepare.request, 0))
        await stage.decode.hears(m.PrepareDecode, 2)
        stage.decode.say(m.Prepared(prepare.request, 1, [0, 1, 2, 3]))
        await stage.prefill.hears(m.StartPrefill, 2)
        stage.clock.now_s = 107
        await stage.prefilled(1, 51)
        await stage.decode.hears(m.StartDecode, 1 + lost_after_first_token)
        if not lost_after_first_token:
            stage.decode.say(m.Tokens([m.StepTokens(prepare.request, 1, m.Draw(52))]))
        stage.decode.say(m.Finished(prepare.request, 1, "length"))
        await client
        timings = stage.got[-1].timings
        assert timings is not None
        stages = (timings.scheduling_s, timings.allocation_s, timings.read_s, timings.prefill_s, timings.decode_s)
        assert stages == ((0, 0, 0, 100, 7) if lost_after_first_token else (100, 0, 0, 7, 0))
        assert timings.attempts == 2

    on_stage(tmp_path, monkeypatch, work)


def test_engines_are_numbered_within_their_role(tmp_path: Path) -> None:
    async def run() -> None:
        async with head(tmp_path) as cluster:
            for role in (Role.PREFILL, Role.DECODE, Role.DECODE, Role.PREFILL):
                await cluster.new(role).join()
            engines = cluster.coordinator.health()["engines"]
            assert [engine["name"] for engine in engines] == ["PE0", "DE0", "DE1", "PE1"]  # type: ignore[attr-defined]

    asyncio.run(run())


SETTINGS = {
    "both-sides": {"system": "dualpath-split"},
    "no-cost-reads": {"system": "oracle"},
    "cache-off": {"prefix_cache": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_stages_add_up_in_a_real_cluster(checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """Two turns; of both the stages are within what the client waited, and the second says what was read."""

    async def turn(cluster: Cluster, prompt: list[int]) -> tuple[float, Timings]:
        sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(prompt_token_ids=prompt, sampling=sampling)
        asked_s = time.perf_counter()
        steps = [(time.perf_counter() - asked_s, step) async for step in cluster.coordinator.generate(request)]
        timings = steps[-1][1].timings
        assert timings is not None
        return steps[0][0], timings

    async def work(cluster: Cluster) -> None:
        for hit_blocks in (0, 9 if name != "cache-off" else 0):
            ttft_s, timings = await turn(cluster, PROMPT * 3)
            stages = timings.scheduling_s, timings.allocation_s, timings.read_s, timings.prefill_s
            assert min(stages) >= 0 and timings.prefill_s > 0 and timings.decode_s > 0
            assert sum(stages) <= ttft_s
            assert timings.pe_read_tokens + timings.de_read_tokens == hit_blocks * 64
            assert (timings.read_s > 0) <= (hit_blocks > 0)
            assert (timings.prefill_engine, timings.decode_engine, timings.attempts) == ("PE0", "DE0", 1)

    in_cluster(cluster_config(checkpoint("qwen3"), tmp_path, **SETTINGS[name]), work)
