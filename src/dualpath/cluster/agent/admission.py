"""How a decode engine takes a sequence: device blocks, then its prompt's KV out of the DE buffer (paper §4.1)."""

import asyncio
from concurrent.futures import Executor

from dualpath.cluster import messages as m
from dualpath.cluster.agent.decode_attempt import DecodeAttempt
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.attachment import Admit, Constrain, Fill, Reply
from dualpath.core.vocabulary import BLOCK_TOKENS


class Admission:
    """Used from the agent's asyncio thread. Raises EngineGoneError."""

    def __init__(self, host: EngineHost, copies: Executor) -> None:
        """`copies` is a thread that may wait for the CNIC."""
        self._host = host
        self._copies = copies

    async def admit(self, attempt: DecodeAttempt, message: m.StartDecode) -> Reply | None:
        """Have the engine take device blocks and copy the pages in. Returns a reply that says why it can't.

        A vLLM server answers when a client has asked it for the attempt; what it is told before waits for that. To stop
        one that has not been told, do nothing here.
        """
        if attempt.aborted:
            return Reply(0, error="aborted")
        engine, sampling = self._host.attached, message.sampling
        if sampling.is_constrained:
            made = await engine.call(lambda call: Constrain(call, attempt.owner, sampling, message.history))
            if made.error:
                return made
        admitted = engine.call(
            lambda call: Admit(
                call,
                attempt.sequence,
                attempt.owner,
                attempt.prompt_tokens,
                None if message.draw is None else message.draw.token_id,
                sampling,
                message.generated_tokens,
            )
        )
        filled = await self._fill(attempt)
        replies = [await admitted, *[await one for one in filled]]
        return next((reply for reply in replies if reply.error), None)

    async def _fill(self, attempt: DecodeAttempt) -> "list[asyncio.Future[Reply]]":
        """Copy the DE buffer to the device through the CNIC, which lets through one Full Block at a time."""
        layout, loop, fills = self._host.layout, asyncio.get_running_loop(), []
        blocks = [
            (block, page, min(BLOCK_TOKENS, attempt.prompt_tokens - block * BLOCK_TOKENS))
            for block, page in attempt.pages.items()
        ]
        at_once = len(blocks) if self._host.config.cluster.cnic_rate is None else 1
        for first in range(0, len(blocks), at_once):
            if attempt.aborted:
                break
            part = blocks[first : first + at_once]
            n_bytes = sum(
                tokens * layout.row_bytes[layer]
                for block, _, tokens in part
                for layer in layout.layers_seen(block, attempt.prompt_tokens)
            )
            await loop.run_in_executor(self._copies, self._host.traffic.local_copy, n_bytes)
            fills.append(self._host.attached.call(lambda call, part=part: Fill(call, attempt.sequence, part)))  # type: ignore[misc]
        return fills
