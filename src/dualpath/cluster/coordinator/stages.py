"""When a request reached each stage of its life, as the coordinator sees it: commands that leave, reports that come.

::

    arrival ──► Prepare ──► Prepared, Load to the PE ──► last Loaded ──► first token ──► last token
       scheduling      allocation                  read           prefill         decode

Core knows these moments too, but a clock is none of its business; each stamp here costs one reading of it.
"""

import time
from collections.abc import Sequence

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side
from dualpath.spec.timings import Timings


class Stages(msgspec.Struct):
    """Of one attempt; the monotonic clock's nanoseconds, 0 for what has not happened."""

    told_ns: int = 0
    """Its `Prepare` went out."""
    allocated_ns: int = 0
    """The later of: the DE said `Prepared`, the last `Load` went out."""
    loaded_ns: int = 0
    """The last leg so far arrived."""
    prefill_engine: str = ""
    decode_engine: str = ""

    def told(self) -> None:
        self.told_ns = time.monotonic_ns()

    def allocated(self) -> None:
        """Some of its blocks are: the last call counts."""
        self.allocated_ns = time.monotonic_ns()

    def loaded(self) -> None:
        """One leg is: the last call counts."""
        self.loaded_ns = time.monotonic_ns()

    def timings(self, arrived_ns: int, legs: Sequence[Leg], attempts: int) -> Timings:
        """Of an attempt whose first token is out just now."""
        now_ns = time.monotonic_ns()
        ready_ns = max(self.allocated_ns, self.loaded_ns)
        tokens = {side: sum(leg.blocks for leg in legs if leg.side is side) * BLOCK_TOKENS for side in Side}
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
            attempts=attempts,
        )
