"""`Member`: one engine's life in its node's agent, from when it has attached until nothing of it moves any more."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

from dualpath.cluster import messages as m
from dualpath.cluster import orders as o
from dualpath.cluster.agent.attached import EngineGoneError
from dualpath.cluster.agent.decode import DecodeWorker
from dualpath.cluster.agent.host import ABANDON_POLL_S, EngineHost
from dualpath.cluster.agent.layer_threads import LayerThreads
from dualpath.cluster.agent.prefill import PrefillWorker
from dualpath.cluster.agent.vllm_engine import VllmEngine, refuse
from dualpath.cluster.agent.vllm_prefill import VllmPrefillWorker
from dualpath.cluster.agent.vllm_probe import measure_tokens_per_s
from dualpath.cluster.attachment import CarryOut
from dualpath.cluster.control_link import ABANDONED
from dualpath.cluster.shared_rows import SharedRows
from dualpath.core.vocabulary import Role


class Member:
    """An engine that takes part in the cluster. Raises OSError when a prefill engine's rows can't be mapped."""

    def __init__(self, host: EngineHost) -> None:
        self.host = host
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        engine, facts = host.attached, host.attached.facts
        self._fingerprint = facts.model_fingerprint
        """Of the weights in use."""
        self._read = ""
        self._asleep = False
        self._orders = 0
        """Orders that are not answered yet."""
        self._prefill_tokens_per_s = facts.prefill_tokens_per_s
        self.worker: PrefillWorker | VllmPrefillWorker | DecodeWorker
        self.layers = LayerThreads(None)
        if facts.role is Role.DECODE:
            self.worker = DecodeWorker(host)
        elif isinstance(engine, VllmEngine):
            self.worker = VllmPrefillWorker(host, engine)
        else:
            self.layers = LayerThreads(SharedRows.attach(facts.rows_path))
            self.worker = PrefillWorker(host, engine, self.layers)

    async def serve(self) -> None:
        """Join, and handle the coordinator's messages until the engine is gone or dismissed; then free everything."""
        host = self.host
        listening = asyncio.create_task(self._listen())
        listening.add_done_callback(lambda ended: host.leave(f"its process is gone: {_reason(ended)}"))
        try:
            if await self._get_ready():
                reason = await host.run(self._join_message(), self.handle, self._come_back)
            else:
                reason = await host.ended
            host.dismiss(reason, failed=reason.startswith(("internal error", ABANDONED)))
        except (ConnectionRefusedError, ValueError) as error:
            host.log(f"can't join: {error}")
            host.dismiss(f"it can't join: {error}", failed=True, refused=True)
        finally:
            await host.end_tasks()
            host.attached.close("dismissed")
            await asyncio.shield(asyncio.gather(listening, asyncio.to_thread(self._free), return_exceptions=True))
            host.link.close()
            self.ended.set_result(None)

    async def _listen(self) -> str:
        engine, worker = self.host.attached, self.worker
        if isinstance(engine, VllmEngine):
            assert not isinstance(worker, PrefillWorker)
            return await engine.listen(worker.on_told)
        assert not isinstance(worker, VllmPrefillWorker)
        return await engine.listen(worker.on_steps)

    async def _get_ready(self) -> bool:
        """Wait for the HTTP server of a vLLM engine, and measure it. Returns False when it has to leave before.

        Raises ValueError when it can't take part.
        """
        engine = self.host.attached
        if not isinstance(engine, VllmEngine):
            return True
        ready = asyncio.create_task(self._measure(engine))
        try:
            ends: list[asyncio.Future[Any]] = [ready, self.host.ended]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if ready.done() and not ready.cancelled():
                await ready
                return True
            return False  # it is gone, or its node stops
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def _measure(self, engine: VllmEngine) -> None:
        await engine.serves()
        if engine.facts.role is Role.PREFILL:
            self._prefill_tokens_per_s = await measure_tokens_per_s(self.host, engine)

    def leave(self, reason: str) -> None:
        self.host.leave(reason)

    def handle(self, message: m.ToEngine) -> None:
        """Handle one message: an operator's order, or one about requests."""
        if isinstance(message, o.EngineOrder):
            self.host.spawn(self._carry_out(message))
        else:
            self.worker.handle(message)

    async def _carry_out(self, order: o.EngineOrder) -> None:
        if isinstance(self.host.attached, VllmEngine):
            self.host.send(refuse(order))
            return
        self._orders += 1
        try:
            reply = await self.host.attached.call(lambda call: CarryOut(call, order))
        except EngineGoneError:
            return  # the coordinator learns that it is lost
        finally:
            self._orders -= 1
        assert reply.order_done is not None
        if not reply.order_done.error:
            self._note(order, reply.order_done.fingerprint)
        self.host.send(reply.order_done)

    def _note(self, order: o.EngineOrder, fingerprint: str) -> None:
        """Keep what another coordinator must know of the engine."""
        match order:
            case o.ReadWeights():
                self._read = fingerprint
            case o.UseWeights():
                self._fingerprint = self._read
            case o.ReleaseMemory():
                self._asleep = True
            case o.RestoreMemory():
                self._asleep = False
                self._fingerprint = fingerprint or self._fingerprint

    async def _come_back(self) -> m.Join:
        """Ready the engine for another coordinator. One that sleeps leaves: nobody else can wake it."""
        await self.worker.abandon()
        while self._orders:
            await asyncio.sleep(ABANDON_POLL_S)
        if self._asleep:
            self.host.leave(f"{ABANDONED}: its memory sleeps, and who could wake it is gone")
        return self._join_message()

    def _free(self) -> None:
        """Blocks until nothing of the engine moves any more."""
        self.worker.close()
        self.host.free()

    def _join_message(self) -> m.Join:
        host, facts = self.host, self.host.attached.facts
        return m.Join(
            role=facts.role,
            pid=facts.pid,
            agent_pid=os.getpid(),
            host=socket.gethostname(),
            node=host.config.name,
            buffer_blocks=host.buffer_blocks,
            hbm_blocks=facts.hbm_blocks,
            data_address=host.server.address,
            transport=host.config.cluster.transport,
            kernel=_kernel(),
            layout=facts.layout,
            model_fingerprint=self._fingerprint,
            max_model_len_tokens=facts.max_model_len_tokens,
            vocab_size=facts.vocab_size,
            eos_token_ids=facts.eos_token_ids,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            name=facts.name,
            ticket=facts.ticket,
            agent_ticket=host.config.ticket,
            **self._where(),
        )

    def _where(self) -> dict[str, Any]:
        """Returns what a `Join` says of a vLLM server."""
        engine = self.host.attached
        if not isinstance(engine, VllmEngine):
            return {}
        return {"url": engine.said.url, "model": engine.said.model, "dp_rank": engine.said.dp_rank}


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _reason(listening: "asyncio.Task[str]") -> str:
    if listening.cancelled():
        return "its agent ends"
    return repr(listening.exception()) if listening.exception() is not None else listening.result()
