"""vLLM servers under real agents and a real coordinator: every path, what fails in each phase, who gives back what.

The servers are fakes that check each byte of KV (`fake_vllm`); the test is their router.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from dualpath.cluster.agent.main import NodeAgent
from dualpath.cluster.agent.member import Member
from dualpath.cluster.attachment import AgentConfig
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.coordinator.coordinator import Coordinator
from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, Handoff
from dualpath.core.vocabulary import Role
from dualpath.kv import PosixStore
from dualpath.kv.keys import block_keys, namespace
from dualpath.spec.sampling import SamplingParams
from dualpath.spec.timings import Timings
from dualpath.spec.topology import Topology

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
            assert not coordinator.failure.done(), coordinator.failure
            await made.nothing_held()
            assert [wrong for server in servers.values() for wrong in server.wrong] == []
            await made.close()
            for agent in agents:
                await agent.__aexit__()
    finally:
        await coordinator.stop()


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
