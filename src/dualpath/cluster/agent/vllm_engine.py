"""`VllmEngine`: a vLLM server's engine as its agent sees it: every worker of it together, and its HTTP server.

It has the interface of `AttachedEngine`. What the agent tells, all workers are told; a call is answered when all have
answered it, with the first error. When one worker is gone, so is the engine.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec

from dualpath.cluster import attachment as a
from dualpath.cluster import orders as o
from dualpath.cluster import vllm_attachment as v
from dualpath.cluster.agent.attached import AttachedEngine
from dualpath.cluster.agent.vllm_client import VllmClient
from dualpath.cluster.attachment import Owner
from dualpath.spec.metrics import Figures

POLL_S = 0.5
STARTS_S = 3600.0
"""How long a server may take from when its workers have attached until it serves."""
Hear = Callable[[int, v.Told], None]
"""Takes a worker's rank and what it has told unasked."""

_decoder = msgspec.msgpack.Decoder(v.FromWorker)


class VllmWorker(AttachedEngine):
    """One worker; it is listened to from the start, so that its end is seen while others are still awaited."""

    def __init__(self, said: v.AttachWorker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(said.engine, reader, writer, _decoder)
        self.rank = said.rank
        self.hear: Hear = lambda _rank, _told: None
        self.listening = asyncio.create_task(self.listen(lambda told: self.hear(self.rank, told)))


class VllmEngine:
    """Used from the agent's asyncio thread."""

    def __init__(self, said: v.AttachWorker, workers: list[VllmWorker]) -> None:
        """`workers` are in the order of their ranks."""
        self.said = said
        self.facts = said.engine
        self.workers = workers
        self.server = VllmClient(said.url, said.model, said.dp_rank)
        self._dropped: dict[Owner, list[_Dropped]] = {}
        self._gone = False

    @property
    def gauges(self) -> Figures:
        return self.workers[0].gauges

    @property
    def heard_s(self) -> float:
        """When the worker was heard that has been silent longest."""
        return min(worker.heard_s for worker in self.workers)

    async def serves(self) -> None:
        """Wait until the HTTP server answers. Raises ValueError when that takes too long."""
        try:
            async with asyncio.timeout(STARTS_S):
                while not await self.server.healthy():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise ValueError(f"{self.said.url}/health was not well within {STARTS_S:.0f} s") from None

    async def listen(self, hear: Hear) -> str:
        """Pass on what the workers tell until one is gone; then end all. Returns why."""
        for worker in self.workers:
            worker.hear = partial(self._hear, hear)
        listening = [worker.listening for worker in self.workers]
        try:
            await asyncio.wait(listening, return_when=asyncio.FIRST_COMPLETED)
            first = next(worker for worker in self.workers if worker.listening.done())
            why = f"worker {first.rank}: {_outcome(first.listening)}"
        finally:
            self.close("another worker is gone, or the agent ends")
            await asyncio.gather(*listening, self.server.close(), return_exceptions=True)
        return why

    def _hear(self, hear: Hear, rank: int, told: v.Told) -> None:
        if isinstance(told, v.Quiet):
            self._on_quiet(rank, told.owner)
        else:
            hear(rank, told)

    def tell(self, message: msgspec.Struct) -> None:
        """Send a message that has no answer. Nothing happens when the engine is gone."""
        for worker in self.workers:
            worker.tell(message)

    def call(self, make: Callable[[int], a.Call]) -> "asyncio.Future[a.Reply]":
        """Send a call to every worker. The future gets the first error, or the reply; or EngineGoneError."""
        answer: asyncio.Future[a.Reply] = asyncio.get_running_loop().create_future()
        left = len(self.workers)
        failed: a.Reply | None = None

        def on_reply(done: "asyncio.Future[a.Reply]") -> None:
            nonlocal left, failed
            left -= 1
            if answer.done():
                return
            if (error := done.exception()) is not None:
                answer.set_exception(error)
                answer.exception()  # the caller may have been cancelled
                return
            failed = failed or (done.result() if done.result().error else None)
            if not left:
                answer.set_result(failed or done.result())

        for worker in self.workers:
            worker.call(make).add_done_callback(on_reply)
        return answer

    # ── the end of an attempt ───────────────────────────────────────────────────────────────────────────────────────

    def drop(self, owner: Owner) -> "asyncio.Future[None]":
        """Tell every worker to touch the attempt's pages no more. The future ends when all are quiet.

        It is cancelled when the engine is gone.
        """
        dropped = _Dropped(set(range(len(self.workers))), asyncio.get_running_loop().create_future())
        if self._gone:
            dropped.quiet.cancel()
            return dropped.quiet
        self._dropped.setdefault(owner, []).append(dropped)
        self.tell(v.Drop(owner))
        return dropped.quiet

    @property
    def dropping(self) -> bool:
        """Whether a worker owes a `Quiet`. Owners begin anew with the next coordinator, so it must not come then."""
        return bool(self._dropped)

    def _on_quiet(self, rank: int, owner: Owner) -> None:
        """One that answers no `Drop` means nothing."""
        waiting = self._dropped.get(owner, [])
        dropped = next((one for one in waiting if rank in one.awaited), None)
        if dropped is None:
            return
        dropped.awaited.discard(rank)
        if not dropped.awaited:
            waiting.remove(dropped)
            if not dropped.quiet.done():
                dropped.quiet.set_result(None)
        if not waiting:
            del self._dropped[owner]

    def close(self, why: str) -> None:
        """End the connections and every open call. A second call does nothing."""
        self._gone = True
        for worker in self.workers:
            worker.close(why)
        dropped, self._dropped = self._dropped, {}
        for waiting in dropped.values():
            for one in waiting:
                one.quiet.cancel()


class _Dropped:
    def __init__(self, awaited: set[int], quiet: "asyncio.Future[None]") -> None:
        self.awaited = awaited
        """Ranks of the workers that are not quiet yet."""
        self.quiet = quiet


def _outcome(listening: "asyncio.Task[str]") -> str:
    return repr(listening.exception()) if listening.exception() is not None else listening.result()


def refuse(order: o.EngineOrder) -> o.OrderDone:
    """Returns the answer to an operator's order, which no vLLM server carries out for us; undoing one is easy."""
    if isinstance(order, o.DropWeights | o.RestoreMemory):
        return o.OrderDone(order.order)
    return o.OrderDone(order.order, error="this engine is a vLLM server: its weights and memory are not ours to change")
