"""A prefill and a decode server with a scripted agent each, and the life of a request on them."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.vllm.scripted_agent import BLOCK, ScriptedAgent
from tests.vllm.vllm_process import VllmProcess, connector_config, free_port

_requests = itertools.count(1)


class Pair:
    """One PE and one DE; the test is the network between them."""

    def __init__(
        self, model: Path, folder: Path, prefill: list[str], decode: list[str], workers: tuple[int, int] = (1, 1)
    ) -> None:
        sockets = (folder / "pe.sock", folder / "de.sock")
        self.agents = [ScriptedAgent(path, workers=count).start() for path, count in zip(sockets, workers, strict=True)]
        self.pe_agent, self.de_agent = self.agents
        self.servers = []
        for role, agent, arguments in zip(("prefill", "decode"), self.agents, (prefill, decode), strict=True):
            port = free_port()
            role_arguments = ["--no-enable-prefix-caching"] if role == "prefill" else ["--enable-prefix-caching"]
            self.servers.append(
                VllmProcess(
                    model,
                    folder / f"{role}.log",
                    "--port",
                    str(port),
                    *role_arguments,
                    *arguments,
                    transfer=connector_config(role, agent.path, port),
                )
            )
        self.pe, self.de = self.servers

    def wait(self) -> "Pair":
        for server, agent in zip(self.servers, self.agents, strict=True):
            server.wait()
            agent.wait_attached()
        return self

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        for agent in self.agents:
            agent.stop()

    def owner(self) -> tuple[int, int]:
        return (next(_requests), 0)

    def prefill(self, prompt: list[int], owner: tuple[int, int], hit: list[int] | None = None) -> list[int]:
        """Returns the prompt's pages at the PE, complete. `hit`: pages whose KV the PE is given."""
        agent, hit = self.pe_agent, hit or []
        pages = agent.take(owner, len(prompt))
        for source, page in zip(hit, pages, strict=False):
            agent.page(page)[:] = agent.page(source)
        hit_tokens = len(hit) * BLOCK
        agent.expect(owner, pages, hit_tokens, len(prompt))
        self.pe.complete(prompt, 1, {"owner": list(owner), "hit_tokens": hit_tokens})
        agent.wait_saved(owner, len(prompt))
        return pages

    def ship(self, owner: tuple[int, int], pages: list[int]) -> list[int]:
        """Copy pages of the PE to the DE. Returns them there."""
        shipped = self.de_agent.take(owner, len(pages) * BLOCK)
        for source, page in zip(pages, shipped, strict=True):
            self.de_agent.page(page)[:] = self.pe_agent.page(source)
        return shipped

    @contextmanager
    def decoding(self, prompt: list[int], owner: tuple[int, int], tokens: int, **fields: Any) -> Iterator["Answer"]:
        """A request at the DE that waits for its owner's KV; its answer is there at the end."""
        answer = Answer()

        def ask() -> None:
            ours = {"owner": list(owner), "prompt_tokens": len(prompt)}
            answer.choice = self.de.complete(prompt, tokens, ours, **fields)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        yield answer
        thread.join(300)
        assert answer.choice is not None

    def serve(
        self,
        prompt: list[int],
        tokens: int,
        hit: list[int] | None = None,
        before_decoding: Callable[[], object] = lambda: None,
    ) -> "Answer":
        """A request from end to end. Pages are given back."""
        owner = self.owner()
        pages = self.prefill(prompt, owner, hit)
        shipped = self.ship(owner, pages)
        before_decoding()
        agent, sequence = self.de_agent, owner[0]
        calls = [agent.admit(sequence, owner, len(prompt)), agent.fill(sequence, shipped, len(prompt))]
        with self.decoding(prompt, owner, tokens) as answer:
            assert [agent.answer(call) for call in calls] == ["", ""]
            assert agent.begin(sequence) == ""
        answer.told, answer.reason = agent.generated(sequence)
        assert agent.release(sequence) == ""
        agent.pool.free(owner, shipped)
        self.pe_agent.pool.free(owner, pages)
        return answer

    def block(self, agent: ScriptedAgent, page: int) -> np.ndarray:
        assert agent.hello is not None
        dtype = {"float32": np.float32, "bfloat16": np.uint16}[agent.hello.engine.layout.dtype]
        return agent.page(page).view(dtype).copy()


class Answer:
    choice: Any = None
    told: list[int]
    reason: str
