"""vLLM servers under real agents and a real coordinator: every path, what fails in each phase, who gives back what.

The servers are fakes that check each byte of KV (`fake_vllm`); the test is their router.
"""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from dualpath.cluster import messages as m
from dualpath.cluster.agent.main import NodeAgent
from dualpath.cluster.agent.member import Member
from dualpath.cluster.attachment import AgentConfig
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, Handoff, RequestError
from dualpath.core.vocabulary import Cause, Role
from dualpath.kv import PosixStore
from dualpath.kv.keys import block_keys, namespace
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.timings import Timings
from dualpath.spec.topology import Topology
from dualpath.transfer.transport import Channel, TransferCause, TransferError

from .fake_engine import SECRET, FakeCrew
from .fake_vllm import LAYOUT, FakeVllm, full_block, next_token

WAIT_S = 20.0
PROMPT = [n * 7 % 251 for n in range(500)]


class Answer:
    """What one request gave its client."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.handoffs: list[Handoff] = []
        self.timings: Timings | None = None
        self.finish_reason = ""


class Site:
    """A coordinator, agents and servers; `ask` is the router."""

    def __init__(self, coordinator: Coordinator, agents: list[NodeAgent], servers: dict[str, FakeVllm]) -> None:
        self.coordinator = coordinator
        self.agents = agents
        self.servers = servers
        self._http = httpx.AsyncClient(trust_env=False, timeout=WAIT_S)

    @property
    def prefill(self) -> FakeVllm:
        return self.servers["prefill-0"]

    @property
    def decode(self) -> FakeVllm:
        return self.servers["decode-0"]

    @property
    def members(self) -> list[Member]:
        return [member for agent in self.agents for member in agent.members]

    def member(self, name: str) -> Member:
        return next(member for member in self.members if member.host.attached.facts.name == name)

    async def ask(self, prompt: list[int] = PROMPT, max_tokens: int = 80) -> Answer:
        """Raises RequestError."""
        answer, posting = Answer(), None
        request = GenerateRequest(prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
        async with asyncio.timeout(WAIT_S), aclosing(self.coordinator.route(request)) as events:
            try:
                async for event in events:
                    if isinstance(event, GeneratedTokens):
                        answer.finish_reason = event.finish_reason or ""
                        break
                    if posting is not None:
                        posting.cancel()
                    answer.handoffs.append(event)
                    posting = asyncio.create_task(self._post(answer, event, prompt, max_tokens))
                if posting is not None:
                    await posting
            finally:
                if posting is not None:
                    posting.cancel()
        return answer

    async def _post(self, answer: Answer, handoff: Handoff, prompt: list[int], max_tokens: int) -> None:
        params = {"dualpath": {"owner": handoff.owner, "prompt_tokens": len(prompt)}}
        body = {"model": handoff.model, "prompt": prompt, "max_tokens": max_tokens, "kv_transfer_params": params}
        try:
            got = await self._http.post(f"{handoff.url}/v1/completions", json=body)
            got.raise_for_status()
        except httpx.HTTPError as error:
            self.coordinator.hand_off_failed(handoff.owner, repr(error))
            return
        timings = self.coordinator.answered(handoff.owner)
        if timings is not None:
            answer.token_ids, answer.timings = got.json()["token_ids"], timings

    async def nothing_held(self) -> None:
        """Waits until no block is held anywhere."""
        async with asyncio.timeout(WAIT_S):
            while self.coordinator.scheduler_holdings() or any(self._held(member) for member in self.members):
                await asyncio.sleep(0.01)

    def _held(self, member: Member) -> float:
        gauges: dict[str, float] = {}
        for source in member.host.gauge_sources:
            gauges |= source()
        return sum(n for name, n in gauges.items() if name.endswith(("attempts", "held_blocks", "quarantined_blocks")))

    async def close(self) -> None:
        await self._http.aclose()


def cluster(store: Path, **settings: object) -> ClusterConfig:
    defaults: dict[str, object] = {
        "model": "fake",
        "store": str(store),
        "topology": Topology(1, 1),
        "cluster_secret": SECRET,
        "durable": False,
        "buffer_bytes": 24 * LAYOUT.full_block_bytes,
        "lease_ns": 60_000_000_000,
        "max_attempts": 2,
    }
    return ClusterConfig(**(defaults | settings))  # type: ignore[arg-type]


@asynccontextmanager
async def site(
    directory: str, store: Path, *, decodes: int = 1, workers: int = 1, chunk_tokens: int = 192, **settings: object
) -> AsyncIterator[Site]:
    config = cluster(store, **({"topology": Topology(1, decodes)} | settings))
    coordinator = Coordinator(config, FakeCrew())
    coordinator.start()
    names = ["prefill-0", *(f"decode-{number}" for number in range(decodes))]
    agents: list[NodeAgent] = []
    servers: dict[str, FakeVllm] = {}
    try:
        with ExitStack() as stack:
            for name in names:
                path = f"{directory}/{name}.sock"
                at = AgentConfig(coordinator=coordinator.control_address, cluster=config, name=name, socket=path)
                agents.append(await NodeAgent(at).__aenter__())
                role = Role(name.partition("-")[0])
                server = servers[name] = FakeVllm(path, role, name, workers, chunk_tokens)
                stack.callback(server.close)
                await asyncio.to_thread(server.start)
            async with asyncio.timeout(WAIT_S):
                await coordinator.membership.complete(WAIT_S)
            made = Site(coordinator, agents, servers)
            yield made
            coordinator = made.coordinator
            assert not coordinator.failure.done(), coordinator.failure
            await made.nothing_held()
            assert [wrong for server in servers.values() for wrong in server.wrong] == []
            await made.close()
            for agent in agents:
                await agent.__aexit__()
    finally:
        await coordinator.stop()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as made:  # tmp_path may be too long for a socket
        yield made


def on_site(directory: str, store: Path, work: Callable[[Site], Awaitable[None]], **settings: object) -> None:
    async def run() -> None:
        async with site(directory, store, **settings) as made:  # type: ignore[arg-type]
            await work(made)

    asyncio.run(run())


def expected(prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def check_store(store: Path, tokens: list[int]) -> None:
    """All full blocks of the tokens are stored, with their KV."""
    space = namespace("fake", "", LAYOUT)
    files = PosixStore(store, durable=False)
    for block, key in enumerate(block_keys(space.root, tokens)):
        found = bytearray(LAYOUT.full_block_bytes)
        files.read(space, key, memoryview(found), lambda _: None)  # type: ignore[arg-type]
        assert bytes(found) == full_block(tokens, block), f"block {block}"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("system", "reads"), [("basic-layerwise", (1, 0)), ("de-only", (0, 1)), ("dualpath-split", (1, 1))]
)
def test_two_turns_of_an_agent(
    directory: str, tmp_path: Path, system: str, reads: tuple[int, int], workers: int
) -> None:
    """The first turn hits nothing, in two chunks; the second hits all of it, by the read path of the system."""

    async def work(at: Site) -> None:
        first = await at.ask(PROMPT, 80)
        assert (first.token_ids, first.finish_reason) == (expected(PROMPT, 80), "length")
        assert first.handoffs[0].cached_tokens == 0
        history = PROMPT + first.token_ids
        check_store(tmp_path, history[:-1])
        prompt = [*history, *range(250)]
        second = await at.ask(prompt, 70)
        assert second.token_ids == expected(prompt, 70)
        assert second.handoffs[0].cached_tokens == (len(history) - 1) // 64 * 64 > 0
        check_store(tmp_path, (prompt + second.token_ids)[:-1])
        assert second.timings is not None
        sides = (second.timings.pe_read_tokens > 0, second.timings.de_read_tokens > 0)
        assert sides == tuple(map(bool, reads))

    on_site(directory, tmp_path, work, system=system, workers=workers)


def test_eight_at_once_in_a_buffer_for_few(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        prompts = [[number, *PROMPT[:400]] for number in range(8)]
        for answer, prompt in zip(await asyncio.gather(*map(at.ask, prompts)), prompts, strict=True):
            assert answer.token_ids == expected(prompt, 80)
        again = [[*prompt, *expected(prompt, 80), 5] for prompt in prompts]
        for answer, prompt in zip(await asyncio.gather(*map(at.ask, again)), again, strict=True):
            assert answer.token_ids == expected(prompt, 80)
            assert answer.handoffs[0].cached_tokens == 448

    on_site(directory, tmp_path, work, system="dualpath-split", workers=2, chunk_tokens=100)


def test_what_the_server_is_asked(directory: str, tmp_path: Path) -> None:
    """The whole prompt, one token, its owner; a key where there is one. The probe before is a turn with a hit."""

    async def work(at: Site) -> None:
        await at.ask(PROMPT, 80)
        await at.ask([*PROMPT, *expected(PROMPT, 80), 5], 2)
        probes, (first, second) = at.prefill.posted[:2], at.prefill.posted[2:]
        assert [one["kv_transfer_params"]["dualpath"]["hit_tokens"] > 0 for one in probes] == [True, True]  # type: ignore[index]
        assert probes[0]["prompt"] != probes[1]["prompt"]
        assert (first["prompt"], first["max_tokens"]) == (PROMPT, 1)
        assert second["prompt"] == [*PROMPT, *expected(PROMPT, 80), 5]
        assert second["kv_transfer_params"] == {"dualpath": {"owner": [1, 0], "hit_tokens": 576}}
        assert {one["Authorization"] for one in at.prefill.headers} == {"Bearer a key"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "a key")
        on_site(directory, tmp_path, work)


def test_a_preempted_prompt_is_computed_again(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        at.prefill.preempt_once = True
        assert (await at.ask()).token_ids == expected(PROMPT, 80)
        assert not at.prefill.preempt_once

    on_site(directory, tmp_path, work, workers=2)


async def reaches(server: FakeVllm, place: str) -> Callable[[], None]:
    """Wait until the server stands at a place; the result lets it go on."""
    reached, go_on = server.gate(place)
    assert await asyncio.to_thread(reached.wait, WAIT_S), place
    return go_on.set


@pytest.mark.parametrize("place", ["posted", "layer 0", "layer 2", "step", "answer"])
@pytest.mark.parametrize("hit", [False, True])
def test_a_client_leaves_while_its_prompt_is_computed(directory: str, tmp_path: Path, place: str, hit: bool) -> None:
    """All is free when every worker is quiet, no sooner; nothing is written into the pages from then on."""

    async def work(at: Site) -> None:
        prompt = PROMPT
        if hit:
            prompt = PROMPT + (await at.ask()).token_ids + PROMPT
        at.prefill.gate(place)
        asking = asyncio.create_task(at.ask(prompt))
        go_on = await reaches(at.prefill, place)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        if place in ("layer 0", "layer 2", "step"):
            await asyncio.sleep(0.1)
            assert at.coordinator.scheduler_holdings() != ()  # the step that runs may still touch them
        go_on()
        await at.nothing_held()
        canaries = {name: paint(at.member(name)) for name in at.servers}
        assert (await at.ask([9, *PROMPT], 4)).token_ids == expected([9, *PROMPT], 4)
        assert canaries

    on_site(directory, tmp_path, work, system="dualpath-split", workers=2)


def paint(member: Member) -> list[int]:
    """Write a canary into every page that nobody holds. Returns these pages."""
    pool = member.host.pool
    free = list(pool._free)
    for page in free:
        pool.view(page)[:] = 0xEE
    return free


def unharmed(member: Member, pages: list[int]) -> bool:
    return all((member.host.pool.view(page) == 0xEE).all() for page in pages)


def test_nothing_is_written_into_pages_that_were_given_back(directory: str, tmp_path: Path) -> None:
    """An attempt is aborted while layers are on their way: once all is free, no byte arrives any more."""

    async def work(at: Site) -> None:
        for number, place in enumerate(["layer 1", "step"]):
            at.prefill.gates.clear()
            at.prefill.gate(place)
            asking = asyncio.create_task(at.ask([number, *PROMPT]))
            go_on = await reaches(at.prefill, place)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            go_on()
            await at.nothing_held()
            canaries = {name: paint(at.member(name)) for name in at.servers}
            await asyncio.sleep(0.3)
            assert all(unharmed(at.member(name), pages) for name, pages in canaries.items())

    on_site(directory, tmp_path, work, workers=2, cnic_bytes_per_s=2_000_000)


def test_a_client_leaves_while_hit_kv_is_pulled(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        prompt = PROMPT + (await at.ask()).token_ids + [5]
        asking = asyncio.create_task(at.ask(prompt))
        pulled = at.member("prefill-0").host.traffic.cnic.rx
        before = pulled.statistics().low_bytes
        async with asyncio.timeout(WAIT_S):
            while pulled.statistics().low_bytes == before:
                await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await at.nothing_held()
        assert (await at.ask(prompt, 4)).token_ids == expected(prompt, 4)

    on_site(directory, tmp_path, work, system="de-only", cnic_bytes_per_s=1_000_000)


@pytest.mark.parametrize("place", ["never asked", "decoding"])
def test_a_client_leaves_the_decode_engine(directory: str, tmp_path: Path, place: str) -> None:
    """Before its server was asked, and while it decodes: the prompt's blocks are stored all the same."""

    async def work(at: Site) -> None:
        request = GenerateRequest(prompt_token_ids=PROMPT, sampling=SamplingParams(max_tokens=80))
        if place == "never asked":
            async with asyncio.timeout(WAIT_S), aclosing(at.coordinator.route(request)) as events:
                assert isinstance(await anext(events), Handoff)
        else:
            at.decode.gate(place)
            asking = asyncio.create_task(at.ask())
            go_on = await reaches(at.decode, place)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            go_on()
        await at.nothing_held()
        check_store(tmp_path, PROMPT)
        assert (await at.ask([*PROMPT, 1], 3)).handoffs[0].cached_tokens == 448

    on_site(directory, tmp_path, work)


def test_a_prefill_server_that_answers_with_an_error(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        at.prefill.errors = [500, 400]
        with pytest.raises(RequestError) as caught:
            await at.ask()
        assert (caught.value.status, caught.value.code) == (503, "compute_failed")
        assert len(at.prefill.posted) == 2 + 2  # probes, attempts
        assert (await at.ask()).token_ids == expected(PROMPT, 80)

    on_site(directory, tmp_path, work)


def test_a_decode_server_that_does_not_answer(directory: str, tmp_path: Path) -> None:
    """The other one does, although the first has more room then."""

    async def work(at: Site) -> None:
        at.decode.errors = at.servers["decode-1"].errors = [500]
        first = await at.ask()
        asked = [handoff.url for handoff in first.handoffs]
        assert sorted(asked) == sorted([at.decode.url, at.servers["decode-1"].url])
        assert first.token_ids == expected(PROMPT, 80)

    on_site(directory, tmp_path, work, decodes=2)


def test_a_server_that_saves_too_little_is_found_out(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        at.prefill.skip_saving = True
        with pytest.raises(RequestError) as caught:
            await at.ask()
        assert caught.value.code == "compute_failed"
        at.prefill.skip_saving = False
        assert (await at.ask()).token_ids == expected(PROMPT, 80)

    on_site(directory, tmp_path, work, workers=2)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("place", ["posted", "layer 1", "answer", "decoding"])
def test_a_worker_dies_and_all_workers_come_again(directory: str, tmp_path: Path, name: str, place: str) -> None:
    """The engine is lost with its buffer; the request waits for another, and goes on there."""

    async def work(at: Site) -> None:
        server = at.decode if place == "decoding" else at.prefill
        server.gate(place)
        asking = asyncio.create_task(at.ask())
        go_on = await reaches(server, place)
        at.servers[name].workers[1].connection.close()
        async with asyncio.timeout(WAIT_S):
            while any(member.host.attached.facts.name == name for member in at.members):
                await asyncio.sleep(0.01)
        go_on()
        await asyncio.to_thread(at.servers[name].restart)
        answer = await asking
        if (name, place) == ("prefill-0", "decoding"):  # it was done with it
            assert answer.token_ids == expected(PROMPT, 80)
        assert answer.token_ids in ([], expected(PROMPT, 80))
        assert (await at.ask()).token_ids == expected(PROMPT, 80)

    on_site(directory, tmp_path, work, workers=2, replacement_timeout_s=20.0, max_attempts=3)


def test_transfers_that_fail_half_way(directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode engine disconnects the prefill engine before it frees the pages; the next attempt connects again."""

    async def work(at: Site) -> None:
        worker = at.member("prefill-0").worker
        real, failed = worker._channels.get, []  # type: ignore[union-attr]

        class Broken:
            def __init__(self, channel: Channel) -> None:
                self.is_open = True
                self.read = channel.read

            def write(self, *_: object) -> "Future[int]":
                failed.append(1)
                future: Future[int] = Future()
                future.set_exception(TransferError(TransferCause.DEADLINE, "too late"))
                return future

        def get(address: str) -> object:
            channel = real(address)
            return channel if failed or channel is None else Broken(channel)

        monkeypatch.setattr(worker._channels, "get", get)  # type: ignore[union-attr]
        sent: list[m.FromEngine] = []
        member = at.member("prefill-0")
        send = member.host.link.send
        monkeypatch.setattr(member.host.link, "send", lambda message: (sent.append(message), send(message)))
        assert (await at.ask()).token_ids == expected(PROMPT, 80)
        assert {one.cause for one in sent if isinstance(one, m.AttemptFailed)} == {Cause.TRANSFER_FAILED}
        assert next(one.quiet for one in sent if isinstance(one, m.Released)) is False

    on_site(directory, tmp_path, work, workers=2, max_attempts=5)


def test_a_silent_worker_is_no_living_engine(directory: str, tmp_path: Path) -> None:
    async def work(at: Site) -> None:
        host = at.member("prefill-0").host
        worker = at.prefill.workers[1]
        async with asyncio.timeout(WAIT_S):
            while not host.link.alive():
                await asyncio.sleep(0.01)
            worker.silent = True
            await asyncio.sleep(0.2)  # what it said before
            host.link.alive()
            await asyncio.sleep(0.3)
            assert not host.link.alive()
            worker.silent = False
            while not host.link.alive():
                await asyncio.sleep(0.01)

    on_site(directory, tmp_path, work, workers=2)


def test_a_coordinator_that_starts_again_finds_them(directory: str, tmp_path: Path) -> None:
    """What was in hand is given up; the servers stay, and serve the next coordinator."""
    control = f"tcp://127.0.0.1:{free_port()}"

    async def work(at: Site) -> None:
        at.prefill.gate("layer 1")
        asking = asyncio.create_task(at.ask())
        go_on = await reaches(at.prefill, "layer 1")
        await at.coordinator.stop(keep_engines=True)
        await asyncio.gather(asking, return_exceptions=True)
        at.coordinator = Coordinator(at.coordinator._config, FakeCrew())
        at.coordinator.start()
        go_on()
        await at.coordinator.membership.complete(WAIT_S)
        assert (await at.ask()).token_ids == expected(PROMPT, 80)

    on_site(directory, tmp_path, work, workers=2, control_address=control, lease_ns=2_000_000_000)
