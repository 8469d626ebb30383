"""`Member`: one engine's life in its node's agent, from when it has attached until nothing of it moves any more."""

import asyncio
import os
import socket
from pathlib import Path

from dualpath.cluster import messages as m
from dualpath.cluster import orders as o
from dualpath.cluster.agent.attached import EngineGoneError
from dualpath.cluster.agent.decode import DecodeWorker
from dualpath.cluster.agent.host import ABANDON_POLL_S, EngineHost
from dualpath.cluster.agent.layer_threads import LayerThreads
from dualpath.cluster.agent.prefill import PrefillWorker
from dualpath.cluster.attachment import CarryOut
from dualpath.cluster.control_link import ABANDONED
from dualpath.cluster.shared_rows import SharedRows
from dualpath.core.vocabulary import Role


class Member:
    """An engine that takes part in the cluster. Raises OSError when a prefill engine's rows can't be mapped."""

    def __init__(self, host: EngineHost) -> None:
        self.host = host
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        facts = host.attached.facts
        self._fingerprint = facts.model_fingerprint
        """Of the weights in use."""
        self._read = ""
        self._asleep = False
        self._orders = 0
        """Orders that are not answered yet."""
        self.worker: PrefillWorker | DecodeWorker
        if facts.role is Role.PREFILL:
            self.layers = LayerThreads(SharedRows.attach(facts.rows_path))
            self.worker = PrefillWorker(host, self.layers)
        else:
            self.layers = LayerThreads(None)
            self.worker = DecodeWorker(host)

    async def serve(self) -> None:
        """Join, and handle the coordinator's messages until the engine is gone or dismissed; then free everything."""
        host = self.host
        listening = asyncio.create_task(host.attached.listen(self.worker.on_steps))
        listening.add_done_callback(lambda ended: host.leave(f"its process is gone: {_reason(ended)}"))
        try:
            reason = await host.run(self._join_message(), self.handle, self._come_back)
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

    def leave(self, reason: str) -> None:
        self.host.leave(reason)

    def handle(self, message: m.ToEngine) -> None:
        """Handle one message: an operator's order, or one about requests."""
        if isinstance(message, o.EngineOrder):
            self.host.spawn(self._carry_out(message))
        else:
            self.worker.handle(message)

    async def _carry_out(self, order: o.EngineOrder) -> None:
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
            prefill_tokens_per_s=facts.prefill_tokens_per_s,
            name=facts.name,
            ticket=facts.ticket,
            agent_ticket=host.config.ticket,
        )


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _reason(listening: "asyncio.Task[str]") -> str:
    if listening.cancelled():
        return "its agent ends"
    return repr(listening.exception()) if listening.exception() is not None else listening.result()
