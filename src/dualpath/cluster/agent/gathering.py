"""Workers of vLLM servers that have attached, until all workers of their engine have."""

import asyncio
import logging

import msgspec

from dualpath.cluster.agent.vllm_engine import VllmEngine, VllmWorker
from dualpath.cluster.attachment import Leave
from dualpath.cluster.vllm_attachment import AttachWorker
from dualpath.spec.log import ROOT

GATHER_S = 120.0
"""How long the other workers of an engine may take after the first."""

logger = logging.getLogger(f"{ROOT}.agent")


class Gathering:
    """Used from the agent's asyncio thread."""

    def __init__(self) -> None:
        self._engines: dict[str, _Incomplete] = {}
        """By name."""

    async def add(
        self, said: AttachWorker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> VllmEngine | None:
        """Add a worker. Returns the engine to the last one to come; None to others, when nobody waits for them more."""
        name, worker = said.engine.name, VllmWorker(said, reader, writer)
        engine = self._engines.get(name)
        why = _refusal(said, engine)
        if why:
            logger.warning("worker %d of engine %s is refused: %s", said.rank, name, why)
            _dismiss(worker, why)
            return None
        first = engine is None
        if engine is None:
            engine = self._engines[name] = _Incomplete(said)
        engine.workers[said.rank] = worker
        worker.listening.add_done_callback(lambda _: self._lost(name, worker))
        if len(engine.workers) == said.workers:
            del self._engines[name]
            engine.complete.set()
            return VllmEngine(said, [engine.workers[rank] for rank in range(said.workers)])
        if first:
            await self._wait(name, engine)
        return None

    async def _wait(self, name: str, engine: "_Incomplete") -> None:
        try:
            async with asyncio.timeout(GATHER_S):
                await engine.complete.wait()
        except TimeoutError:
            why = f"only {len(engine.workers)} of {engine.said.workers} workers of engine {name} have come"
            logger.warning("%s within %.0f s", why, GATHER_S)
            self._give_up(name, engine, why)

    def _give_up(self, name: str, engine: "_Incomplete", why: str) -> None:
        del self._engines[name]
        for worker in list(engine.workers.values()):
            _dismiss(worker, why)

    def _lost(self, name: str, worker: VllmWorker) -> None:
        """It may come again, with others."""
        engine = self._engines.get(name)
        if engine is not None and engine.workers.get(worker.rank) is worker:
            del engine.workers[worker.rank]
            if not engine.workers:
                del self._engines[name]
                engine.complete.set()

    def close(self) -> None:
        for name, engine in list(self._engines.items()):
            self._give_up(name, engine, "its agent ends")


class _Incomplete:
    """An engine some of whose workers have come."""

    def __init__(self, said: AttachWorker) -> None:
        self.said = said
        self.workers: dict[int, VllmWorker] = {}
        self.complete = asyncio.Event()
        """Set when nobody needs to wait for more."""


def _refusal(said: AttachWorker, engine: _Incomplete | None) -> str:
    """Returns why a worker can't belong to the engine; empty when it can."""
    if said.rank >= said.workers:
        return f"it is worker {said.rank} of {said.workers}; ranks begin with 0"
    if engine is None:
        return ""
    if _of_engine(said) != _of_engine(engine.said):
        return f"it says {_of_engine(said)}, an earlier one {_of_engine(engine.said)}; give engines different names"
    if said.rank in engine.workers:
        return f"worker {said.rank} is here already; give engines different names"
    return ""


def _of_engine(said: AttachWorker) -> AttachWorker:
    """Returns what all workers of an engine must say alike."""
    return msgspec.structs.replace(said, rank=0, engine=msgspec.structs.replace(said.engine, pid=0))


def _dismiss(worker: VllmWorker, why: str) -> None:
    worker.tell(Leave(f"its agent can't serve it: {why}", failed=True, refused=True))
    worker.close(why)
