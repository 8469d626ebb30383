"""A coordinator that hands every request off by a script, and the router itself on a real port."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, Handoff, ModelFacts, VllmServer
from dualpath.core.vocabulary import Role
from dualpath.router import create_router
from dualpath.server import bind, serve
from dualpath.server.request_log import Observer, RequestLog
from dualpath.spec.metrics import Figures
from dualpath.spec.timings import Timings

MODEL = "m"
TIMINGS = Timings(
    scheduling_s=0.1,
    allocation_s=0.2,
    read_s=0.3,
    prefill_s=0.4,
    decode_s=0.0,
    prefill_engine="PE0",
    decode_engine="DE0",
    pe_read_tokens=64,
    de_read_tokens=0,
    attempts=1,
)
Step = str | Exception | threading.Event | Handoff | GeneratedTokens
"""Of a script: a URL is a hand-off to it, an Event is waited for, an Exception raised."""
ENDED = GeneratedTokens(token_ids=[], finish_reason="stop")


class FakeRouting:
    """`Router` by script: `steps(request, number)` gives what happens; after a hand-off it waits for its outcome.

    After `hand_off_failed` the script goes on with its next hand-off; after the last `answered`, with what follows.
    """

    def __init__(self, urls: Sequence[str], steps: Callable[[int], list[Step]] | None = None) -> None:
        self.servers = [VllmServer(url=url, model=MODEL, dp_rank=None, role=Role.DECODE) for url in urls]
        self.steps = steps or (lambda number: [urls[0], ENDED])
        self.cached_tokens: Callable[[int], int] = lambda number: 64
        self.dp_rank: int | None = None
        self.moved = False
        """True: `answered` says that another attempt has taken the place."""
        self.requests: list[GenerateRequest] = []
        self.failed: list[tuple[tuple[int, int], str]] = []
        self.answers: list[tuple[int, int]] = []
        self.open = 0
        self.all_closed = threading.Event()
        self.all_closed.set()
        self.status = "ok"
        self._failed: dict[tuple[int, int], asyncio.Event] = {}

    @property
    def model(self) -> ModelFacts:
        return ModelFacts(name=MODEL, path="/models/m", max_model_len_tokens=2048, vocab_size=300, eos_token_ids=(2,))

    def generate(self, request: GenerateRequest) -> Any:
        raise NotImplementedError

    control: Any = None

    def health(self) -> dict[str, object]:
        return {"status": self.status, "engines": []}

    def gauges(self) -> Figures:
        return {}

    def vllm_servers(self) -> list[VllmServer]:
        return self.servers

    def hand_off_failed(self, owner: tuple[int, int], why: str) -> None:
        self.failed.append((owner, why))
        self._failed[owner].set()

    def answered(self, owner: tuple[int, int]) -> Timings | None:
        self.answers.append(owner)
        return None if self.moved else TIMINGS

    async def route(self, request: GenerateRequest) -> AsyncGenerator[Handoff | GeneratedTokens, None]:
        number = len(self.requests)
        self.requests.append(request)
        self.open += 1
        self.all_closed.clear()
        attempt = 0
        try:
            steps = self.steps(number)
            for i, step in enumerate(steps):
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(step, str):
                    owner = (number, attempt)
                    attempt += 1
                    self._failed[owner] = asyncio.Event()
                    yield Handoff(
                        url=step,
                        model=MODEL,
                        dp_rank=self.dp_rank,
                        owner=owner,
                        cached_tokens=self.cached_tokens(number),
                    )
                    if any(isinstance(later, str) for later in steps[i + 1 : i + 2]):
                        await self._failed[owner].wait()
                else:
                    yield step
        finally:
            self.open -= 1
            if not self.open:
                self.all_closed.set()


@contextlib.contextmanager
def running_router(
    cluster: FakeRouting, *, drain_s: float = 2.0, observers: tuple[Observer, ...] = (), **options: Any
) -> Iterator[str]:
    """The router on a free port, in a thread with its own loop; gives its address and shuts down gracefully."""
    ready = threading.Event()
    state: dict[str, Any] = {}

    async def main() -> None:
        def on_bound(port: int) -> None:
            state["port"] = port
            ready.set()

        state["loop"] = asyncio.get_running_loop()
        state["task"] = asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            app = RequestLog(create_router(cluster, **options), observers)
            await serve(app, bind("127.0.0.1", 0), on_bound=on_bound, drain_s=drain_s)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(30), "the router did not start"
        yield f"http://127.0.0.1:{state['port']}"
    finally:
        state["loop"].call_soon_threadsafe(state["task"].cancel)
        thread.join(30)
        assert not thread.is_alive(), "the router did not stop"
