"""A request through the coordinator, engine by engine, message by message: the test speaks for the engines."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, RequestError
from dualpath.core.journal import replay
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.kv import PosixStore
from dualpath.kv.keys import block_keys, namespace
from dualpath.spec.sampling import SamplingParams, TokenHistory
from dualpath.spec.topology import Topology

from .fake_engine import LAYOUT, FakeEngine, Head, head

PROMPT = list(range(200))


class Pair:
    """A prefill and a decode engine of a cluster, and a client's stream."""

    def __init__(self, cluster: Head, prefill: FakeEngine, decode: FakeEngine) -> None:
        self.cluster = cluster
        self.prefill = prefill
        self.decode = decode
        self.got: list[GeneratedTokens] = []
        self.client: asyncio.Task[None]

    def ask(self, prompt: list[int] = PROMPT, **sampling: object) -> None:
        params = SamplingParams(**({"max_tokens": 4, "temperature": 0.0} | sampling))  # type: ignore[arg-type]
        request = GenerateRequest(prompt_token_ids=prompt, sampling=params)

        async def listen() -> None:
            async for step in self.cluster.coordinator.generate(request):
                self.got.append(step)

        self.client = asyncio.create_task(listen())

    @property
    def token_ids(self) -> list[int]:
        return [token for step in self.got for token in step.token_ids]

    async def prepare(self, attempt: int, engine: FakeEngine | None = None) -> m.PrepareDecode:
        prepare = await (engine or self.decode).hears(m.PrepareDecode, attempt + 1)
        assert prepare.attempt == attempt
        blocks = -(-prepare.prompt_tokens // 64)
        (engine or self.decode).say(m.Prepared(prepare.request, attempt, list(range(blocks))))
        return prepare

    async def prefilled(self, attempt: int, token: int) -> m.StartPrefill:
        """The PE computes and draws `token`."""
        start = await self.prefill.hears(m.StartPrefill, attempt + 1)
        self.prefill.say(m.PrefillDone(start.request, attempt, m.Draw(token)))
        return start

    async def prepare_and_prefill(self, count: int) -> m.StartPrefill:
        """The next request's first attempt; `count` prompts were prepared before."""
        prepare = await self.decode.hears(m.PrepareDecode, count + 1)
        self.decode.say(m.Prepared(prepare.request, 0, [0, 1, 2, 3]))
        start = await self.prefill.hears(m.StartPrefill)
        self.prefill.say(m.PrefillDone(start.request, 0, m.Draw(50)))
        return start

    def tokens(self, request: int, attempt: int, *token_ids: int) -> None:
        for token in token_ids:
            self.decode.say(m.Tokens([m.StepTokens(request, attempt, m.Draw(token))]))

    async def idle(self) -> None:
        await self.cluster.becomes("dualpath_requests_live", 0)
        await self.cluster.becomes("dualpath_store_pinned_blocks", 0)
        async with asyncio.timeout(10.0):
            while self.cluster.coordinator.scheduler_holdings():
                await asyncio.sleep(0.002)


def with_pair(store: Path, work: Callable[[Pair], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        async with head(store, **({"lease_ns": 60_000_000_000} | settings)) as cluster:
            pair = Pair(cluster, await cluster.new(Role.PREFILL).join(), await cluster.new(Role.DECODE).join())
            await work(pair)
            await pair.idle()

    asyncio.run(run())


def stored(store: Path, blocks: int) -> None:
    """The first blocks of PROMPT, in the store before the cluster starts."""
    space = namespace("model", "", LAYOUT)
    files = PosixStore(store, durable=False)
    for parent, key in itertools.pairwise([space.root, *block_keys(space.root, PROMPT)[:blocks]]):
        files.write(space, key, parent, bytes(LAYOUT.full_block_bytes))


def test_the_messages_of_a_hit_request(tmp_path: Path) -> None:
    stored(tmp_path, 2)

    async def work(pair: Pair) -> None:
        pair.ask()
        prepare = await pair.prepare(0)
        assert (prepare.prompt_tokens, prepare.hit_tokens, len(prepare.keys)) == (200, 128, 3)
        load = await pair.prefill.hears(m.LoadLeg)
        assert (load.keys, load.leg.side) == (prepare.keys[:2], Side.PE)
        pair.prefill.say(m.Loaded(load.request, 0, Side.PE))
        start = await pair.prefilled(0, 50)
        assert start.miss_token_ids == PROMPT[128:]
        assert start.decode_pages == [0, 1, 2, 3]
        assert start.decode_address == "shm:/nowhere/decode"
        decode = await pair.decode.hears(m.StartDecode)
        assert (decode.tail_token_ids, decode.draw.token_id) == (PROMPT[192:], 50)
        pair.tokens(decode.request, 0, 51, 52, 53)
        pair.decode.say(m.BufferFreed(decode.request, 0, 4))
        pair.decode.say(m.Finished(decode.request, 0, "length"))
        await pair.client
        assert pair.token_ids == [50, 51, 52, 53]
        assert {step.cached_tokens for step in pair.got} == {128}
        assert [step.finish_reason for step in pair.got] == [None] * 4 + ["length"]

    with_pair(tmp_path, work, system="basic-layerwise")


def test_a_retried_attempt_goes_on_where_the_lost_one_stopped(tmp_path: Path) -> None:
    """Tokens the client has are part of the new prompt; what the lost attempt still says is dropped."""
    stored(tmp_path, 2)

    async def work(pair: Pair) -> None:
        pair.ask(max_tokens=70, seed=3, logprobs=1)
        await pair.prepare(0)
        load = await pair.prefill.hears(m.LoadLeg)
        pair.prefill.say(m.Loaded(load.request, 0, Side.PE))
        request = (await pair.prefilled(0, 50)).request
        await pair.decode.hears(m.StartDecode)
        pair.tokens(request, 0, *range(51, 60))
        pair.decode.say(m.AttemptFailed(request, 0, Cause.COMPUTE_FAILED, "broken"))
        pair.tokens(request, 0, 99)  # stale: said after the attempt was given up
        prepare = await pair.prepare(1)
        assert prepare.prompt_tokens == 210
        pair.decode.say(m.Released(request, 0))
        await pair.prefill.hears(m.LoadLeg, 2)
        pair.prefill.say(m.Loaded(request, 1, Side.PE))
        start = await pair.prefilled(1, 60)
        assert start.miss_token_ids == [*PROMPT[128:], *range(50, 60)]
        assert start.generated_tokens == 10
        assert start.sampling.seed == 3
        decode = await pair.decode.hears(m.StartDecode, 2)
        assert decode.generated_tokens == 10
        pair.tokens(request, 1, *range(61, 120))
        pair.decode.say(m.Finished(request, 1, "length"))
        await pair.client
        assert pair.token_ids == list(range(50, 120))
        assert pair.got[-1].finish_reason == "length"
        assert {step.cached_tokens for step in pair.got} == {128}  # of the attempt that gave the first token
        await pair.cluster.becomes("dualpath_stale_messages_total", 1)

    with_pair(tmp_path, work, system="basic-layerwise")


def test_an_attempt_lost_after_its_last_token_is_a_success(tmp_path: Path) -> None:
    """Only its persisting was lost: the client has everything, and nothing is generated again."""

    async def work(pair: Pair) -> None:
        pair.ask(max_tokens=2)
        await pair.prepare(0)
        request = (await pair.prefilled(0, 50)).request
        await pair.decode.hears(m.StartDecode)
        pair.tokens(request, 0, 51)
        pair.decode.say(m.AttemptFailed(request, 0, Cause.COMPUTE_FAILED, "broken"))
        await pair.client
        assert pair.token_ids == [50, 51]
        assert pair.got[-1].finish_reason == "length"
        await pair.decode.hears(m.AbortAttempt)
        pair.decode.say(m.Released(request, 0))

    with_pair(tmp_path, work)


def test_faults_leave_the_index_and_the_next_attempt_does_without(tmp_path: Path) -> None:
    stored(tmp_path, 3)

    async def work(pair: Pair) -> None:
        pair.ask()
        prepare = await pair.prepare(0)
        assert prepare.hit_tokens == 192
        load = await pair.prefill.hears(m.LoadLeg)
        (path,) = tmp_path.rglob(f"{prepare.keys[1].hex()}.kv")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        pair.prefill.say(m.LoadFailed(load.request, 0, Side.PE, [m.BlockFaultReport(prepare.keys[1], "checksum")]))
        for engine in (pair.prefill, pair.decode):
            await engine.hears(m.AbortAttempt)
            engine.say(m.Released(load.request, 0))
        again = await pair.decode.hears(m.PrepareDecode, 2)
        assert again.hit_tokens == 64
        await pair.cluster.coordinator.settle()
        assert [path.name for path in tmp_path.rglob("bad/*")] == [f"{prepare.keys[1].hex()}.checksum"]
        assert [path.stem for path in tmp_path.rglob("*.kv")] == [prepare.keys[0].hex()]
        pair.client.cancel()

        for engine in (pair.prefill, pair.decode):
            await engine.hears(m.AbortAttempt, 2)
            engine.say(m.Released(load.request, 1))

    with_pair(tmp_path, work, system="basic-layerwise")


async def computed_whole(pair: Pair, load: m.LoadLeg) -> None:
    """Both engines let go of the attempt that loads; the next attempt computes the whole prompt."""
    for engine in (pair.prefill, pair.decode):
        await engine.hears(m.AbortAttempt)
        engine.say(m.Released(load.request, 0))
    await pair.prepare(1)
    start = await pair.prefill.hears(m.StartPrefill)
    assert start.hit_tokens == 0
    pair.prefill.say(m.PrefillDone(start.request, 1, m.Draw(50)))
    await pair.decode.hears(m.StartDecode)
    pair.decode.say(m.Finished(start.request, 1, "length"))
    await pair.client


def test_an_engine_that_cannot_reach_the_store_costs_no_block(tmp_path: Path) -> None:
    """No fault is reported with the failure: the index stays as it is, and this request computes its whole prompt."""
    stored(tmp_path, 3)

    async def work(pair: Pair) -> None:
        pair.ask(max_tokens=1)
        await pair.prepare(0)
        load = await pair.prefill.hears(m.LoadLeg)
        pair.prefill.say(m.LoadFailed(load.request, 0, Side.PE, []))
        await computed_whole(pair, load)
        assert pair.cluster.coordinator.gauges()["dualpath_store_blocks"] == 3

    with_pair(tmp_path, work, system="basic-layerwise")


def test_a_prefix_that_does_not_come_in_time_is_computed(tmp_path: Path) -> None:
    stored(tmp_path, 3)

    async def work(pair: Pair) -> None:
        pair.ask(max_tokens=1)
        await pair.prepare(0)
        load = await pair.prefill.hears(m.LoadLeg)
        assert len(load.keys) == 3
        await computed_whole(pair, load)

    with_pair(tmp_path, work, system="basic-layerwise", request_deadline_ns=2_000_000_000)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_transfer_that_failed_half_way_disconnects_its_engine(tmp_path: Path, quiet: bool) -> None:
    """Its last bytes may still be on their way to the DE's pages."""

    async def work(pair: Pair) -> None:
        pair.ask()
        await pair.prepare(0)
        start = await pair.prefill.hears(m.StartPrefill)
        pair.prefill.say(m.AttemptFailed(start.request, 0, Cause.TRANSFER_FAILED, "late"))
        await pair.prefill.hears(m.AbortAttempt)
        assert not pair.decode.all(m.AbortAttempt)  # not before the PE has let go
        pair.prefill.say(m.Released(start.request, 0, quiet))
        abort = await pair.decode.hears(m.AbortAttempt)
        assert abort.lost_peer == (None if quiet else pair.prefill.engine)
        pair.decode.say(m.Released(start.request, 0))
        pair.client.cancel()
        await pair.decode.hears(m.AbortAttempt, 2)
        pair.decode.say(m.Released(start.request, 1))
        for abort in pair.prefill.all(m.AbortAttempt)[1:]:
            pair.prefill.say(m.Released(abort.request, 1))

    with_pair(tmp_path, work)


@pytest.mark.parametrize("stage", ["preparing", "loading", "prefilling", "decoding"])
def test_cancel_at_every_stage(tmp_path: Path, stage: str) -> None:
    stored(tmp_path, 2)

    async def work(pair: Pair) -> None:
        pair.ask()
        await pair.decode.hears(m.PrepareDecode)
        load = await pair.prefill.hears(m.LoadLeg)
        told = [pair.prefill, pair.decode]
        if stage in ("loading", "prefilling", "decoding"):
            await pair.prepare(0)
        if stage in ("prefilling", "decoding"):
            pair.prefill.say(m.Loaded(load.request, 0, Side.PE))
            await pair.prefill.hears(m.StartPrefill)
        if stage == "decoding":
            await pair.prefilled(0, 50)
            await pair.decode.hears(m.StartDecode)
            told = [pair.decode]
        pair.client.cancel()
        await asyncio.gather(pair.client, return_exceptions=True)
        await pair.cluster.becomes("dualpath_requests_live", 0)
        assert pair.cluster.coordinator.gauges()["dualpath_store_pinned_blocks"] == 0
        for engine in told:
            abort = await engine.hears(m.AbortAttempt)
            engine.say(m.Released(abort.request, abort.attempt))

    with_pair(tmp_path, work, system="basic-layerwise")


def test_cancel_while_queued(tmp_path: Path) -> None:
    """No engine was told, so none is asked to let go."""

    async def run() -> None:
        async with head(tmp_path, lease_ns=60_000_000_000) as cluster:
            prefill = await cluster.new(Role.PREFILL).join()
            decode = await cluster.new(Role.DECODE).join(hbm_blocks=4)  # room for one
            pair = Pair(cluster, prefill, decode)
            pair.ask()
            first = pair.client
            await decode.hears(m.PrepareDecode)
            pair.ask()
            await cluster.becomes("dualpath_requests_live", 2)
            for client in (pair.client, first):
                client.cancel()
                await asyncio.gather(client, return_exceptions=True)
            abort = await decode.hears(m.AbortAttempt)
            decode.say(m.Released(abort.request, 0))
            await pair.idle()
            assert len(decode.all(m.PrepareDecode)) == len(decode.all(m.AbortAttempt)) == 1

    asyncio.run(run())


def test_a_killed_engine_in_the_journal(tmp_path: Path) -> None:
    """A run in which both engines of a role are lost, one after the other, replays to the same commands."""
    journal = tmp_path / "journal.jsonl"

    async def work(pair: Pair) -> None:
        second = await pair.cluster.new(Role.DECODE).join(pid=12)
        pair.ask(max_tokens=3)
        async with asyncio.timeout(10.0):
            while not (pair.decode.all(m.PrepareDecode) or second.all(m.PrepareDecode)):
                await asyncio.sleep(0.002)
        first, other = (pair.decode, second) if pair.decode.all(m.PrepareDecode) else (second, pair.decode)
        await pair.prepare(0, first)
        start = await pair.prefill.hears(m.StartPrefill)
        first.say(m.Leave("killed"))
        await pair.prefill.hears(m.AbortAttempt)
        pair.prefill.say(m.Released(start.request, 0))
        prepare = await other.hears(m.PrepareDecode)
        assert prepare.attempt == 1
        other.say(m.Leave("killed too"))
        with pytest.raises(RequestError) as failed:
            await pair.client
        assert (failed.value.status, failed.value.code) == (503, "no_engine")

    with_pair(tmp_path / "store", work, journal=str(journal), topology=Topology(1, 2), replacement_timeout_s=0.5)
    report = replay(journal.read_bytes().splitlines(keepends=True))
    assert report.difference is None
    assert report.commands >= 6


@pytest.mark.parametrize(
    ("prompt", "sampling", "code"),
    [
        ([], {}, "empty_request"),
        ([1], {"max_tokens": 0}, "empty_request"),
        ([1, 256], {}, "invalid_token"),
        ([-1], {}, "invalid_token"),
        ([1] * 4096, {"max_tokens": 1}, "context_length_exceeded"),
    ],
)
def test_what_would_harm_others_is_refused_and_leaves_nothing(
    tmp_path: Path, prompt: list[int], sampling: dict[str, object], code: str
) -> None:
    """A token outside the vocabulary would fail the whole batch it is computed in."""

    async def work(pair: Pair) -> None:
        pair.ask(prompt, **sampling)
        with pytest.raises(RequestError) as refused:
            await pair.client
        assert (refused.value.status, refused.value.code) == (400, code)

    with_pair(tmp_path, work)


def test_stopping_ends_open_requests_and_refuses_new_ones(tmp_path: Path) -> None:
    async def run() -> None:
        async with head(tmp_path) as cluster:
            pair = Pair(cluster, await cluster.new(Role.PREFILL).join(), await cluster.new(Role.DECODE).join())
            pair.ask()
            await pair.decode.hears(m.PrepareDecode)
        for client in (pair.client, None):
            if client is None:
                pair.ask()
            with pytest.raises(RequestError) as ended:
                await pair.client
            assert ended.value.code == "shutting_down"
        assert pair.decode.all(m.Shutdown)

    asyncio.run(run())


def test_a_bug_in_carrying_out_a_command_stops_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loudly, whoever made the input, rather than serve from a state that nobody understands."""

    async def run() -> None:
        with pytest.raises(AssertionError, match="a bug"):
            async with head(tmp_path) as cluster:
                pair = Pair(cluster, await cluster.new(Role.PREFILL).join(), await cluster.new(Role.DECODE).join())

                def broken(*_: object) -> None:
                    raise RuntimeError("a bug")

                monkeypatch.setattr("dualpath.cluster.coordinator.serving.order", broken)
                pair.ask()
                await asyncio.wait([cluster.coordinator.failure], timeout=10.0)
                pair.client.cancel()
                await asyncio.gather(pair.client, return_exceptions=True)

    asyncio.run(run())


def test_a_request_that_no_message_can_carry_fails_alone(tmp_path: Path) -> None:
    """The server lets no such number pass. One that does get here ends its request, not the coordinator."""

    async def work(pair: Pair) -> None:
        pair.ask(top_k=2**64)
        await pair.prepare(0)
        with pytest.raises(RequestError, match=r"can't be sent to an engine.*StartPrefill") as caught:
            await pair.client
        assert caught.value.status == 400
        for engine in (pair.prefill, pair.decode):
            engine.say(m.Released((await engine.hears(m.AbortAttempt)).request, 0))
        await pair.idle()
        pair.ask(max_tokens=1)
        start = await pair.prepare_and_prefill(1)
        pair.decode.say(m.Finished(start.request, 0, "length"))
        await pair.client
        assert pair.token_ids == [50]

    with_pair(tmp_path, work)


def test_what_no_engine_can_do_ends_the_request_without_a_retry(tmp_path: Path) -> None:
    async def work(pair: Pair) -> None:
        pair.ask(grammar="start: missing")
        await pair.prepare(0)
        start = await pair.prefill.hears(m.StartPrefill)
        assert start.history == TokenHistory()
        pair.prefill.say(m.Refused(start.request, 0, "the grammar can't be compiled: missing"))
        with pytest.raises(RequestError, match="can't be compiled") as caught:
            await pair.client
        assert (caught.value.status, caught.value.code) == (400, "invalid_value")
        await pair.prefill.hears(m.AbortAttempt)
        pair.prefill.say(m.Released(start.request, 0))
        await pair.decode.hears(m.AbortAttempt)
        pair.decode.say(m.Released(start.request, 0))

    with_pair(tmp_path, work)


def test_draws_are_told_of_earlier_tokens_where_they_need_them(tmp_path: Path) -> None:
    """A scored prompt reads no prefix; what a retried attempt must know is in its messages."""
    stored(tmp_path, 2)

    async def work(pair: Pair) -> None:
        pair.ask(repetition_penalty=1.5, prompt_logprobs=1)
        await pair.prepare(0)
        start = await pair.prefill.hears(m.StartPrefill)
        assert (start.hit_tokens, start.sampling.prompt_logprobs) == (0, 1)
        assert start.history == TokenHistory(PROMPT, [])
        pair.prefill.say(m.PromptLogprobs(start.request, 0, [[1, 5]] * 199, [[-2.0, -1.0]] * 199, [3] * 199))
        pair.prefill.say(m.PrefillDone(start.request, 0, m.Draw(50)))
        assert (await pair.decode.hears(m.StartDecode)).history == TokenHistory(PROMPT, [50])
        pair.tokens(start.request, 0, 51)
        pair.decode.say(m.AttemptFailed(start.request, 0, Cause.COMPUTE_FAILED, "broken"))
        await pair.prepare(1)
        pair.decode.say(m.Released(start.request, 0))
        load = await pair.prefill.hears(m.LoadLeg)
        pair.prefill.say(m.Loaded(load.request, 1, Side.PE))
        start = await pair.prefilled(1, 52)
        assert (start.hit_tokens, start.sampling.prompt_logprobs) == (128, None)
        assert start.history == TokenHistory(PROMPT, [50, 51])
        assert (await pair.decode.hears(m.StartDecode, 2)).history == TokenHistory(PROMPT, [50, 51, 52])
        pair.tokens(start.request, 1, 53)
        pair.decode.say(m.Finished(start.request, 1, "length"))
        await pair.client
        scores = pair.got[0].prompt_logprobs
        assert scores is not None and len(scores) == 199 and scores[0].rank == 3
        assert all(step.prompt_logprobs is None for step in pair.got[1:])

    with_pair(tmp_path, work, system="basic-layerwise")
