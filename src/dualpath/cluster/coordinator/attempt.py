"""The coordinator's record of one attempt at a request, and when it reached each stage.

::

    arrival ──► Prepare ──► Prepared, Load to the PE ──► last Loaded ──► first token ──► last token
       scheduling      allocation                  read           prefill         decode

The stamps are taken here because core reads no clock; each stamp is one clock read.
"""

import time
from collections.abc import Sequence

import msgspec

from dualpath.cluster.generator import PromptLogprob
from dualpath.cluster.messages import Draw
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Leg, Side
from dualpath.kv.keys import BlockKey
from dualpath.spec.kv_bytes import KVBytes
from dualpath.spec.timings import Timings


class Stages(msgspec.Struct):
    """When one attempt reached each stage, in nanoseconds of the monotonic clock; 0 means not yet."""

    told_ns: int = 0
    """When `Prepare` was sent."""
    allocated_ns: int = 0
    """When the DE answered `Prepared` or the last `Load` was sent, whichever was later."""
    loaded_ns: int = 0
    """When the most recent leg arrived."""
    prefill_engine: str = ""
    decode_engine: str = ""

    def told(self) -> None:
        self.told_ns = time.monotonic_ns()

    def allocated(self) -> None:
        """Some of its blocks are allocated; the last call counts."""
        self.allocated_ns = time.monotonic_ns()

    def loaded(self) -> None:
        """One of its legs is loaded; the last call counts."""
        self.loaded_ns = time.monotonic_ns()

    def timings(self, arrived_ns: int, legs: Sequence[Leg], kv_bytes: KVBytes, attempts: int) -> Timings:
        """Returns the timings of an attempt whose first token is sent now."""
        now_ns = time.monotonic_ns()
        ready_ns = max(self.allocated_ns, self.loaded_ns)
        tokens = {side: sum(leg.blocks for leg in legs if leg.side is side) * BLOCK_TOKENS for side in Side}
        hit_tokens = sum(tokens.values())
        read_bytes = kv_bytes.hit_bytes(hit_tokens)
        return Timings(
            scheduling_s=(self.told_ns - arrived_ns) / 1e9,
            allocation_s=(self.allocated_ns - self.told_ns) / 1e9,
            read_s=(ready_ns - self.allocated_ns) / 1e9,
            prefill_s=(now_ns - ready_ns) / 1e9,
            decode_s=0.0,
            prefill_engine=self.prefill_engine,
            decode_engine=self.decode_engine,
            pe_read_tokens=tokens[Side.PE],
            de_read_tokens=tokens[Side.DE],
            kv_read_bytes=read_bytes,
            kv_unread_bytes=hit_tokens * kv_bytes.bytes_per_token - read_bytes,
            attempts=attempts,
        )


class Attempt(msgspec.Struct):
    """One attempt at a request. Its prompt is the client's plus all tokens that earlier attempts generated."""

    attempt: int
    prompt_token_ids: list[int]
    keys: list[BlockKey]
    hit_tokens: int
    legs: list[Leg] = []
    loaded_legs: int = 0
    decode_pages: list[int] | None = None
    prefilled: bool = False
    first_draw: Draw | None = None
    """None after prefill, too, where a vLLM server draws it."""
    prefill_engine: EngineId | None = None
    decode_engine: EngineId | None = None
    """Which engines have been told of it: they alone can report about it."""
    prompt_logprobs: list[PromptLogprob] = []
    stages: Stages = msgspec.field(default_factory=Stages)
