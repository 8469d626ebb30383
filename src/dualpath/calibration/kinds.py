"""Requests that a cluster is asked while its processes' CPU clocks are read."""

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS
from dualpath.workload import Round, Trajectory

CONTEXT_TOKENS = 2000


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """`count` requests alike, one by one. With a context, it is stored first, and each request begins with it."""

    name: str
    count: int
    append_tokens: int
    generate_tokens: int
    context_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.context_tokens + self.append_tokens

    @property
    def hit_tokens(self) -> int:
        return min(self.context_tokens, self.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def stored_blocks(self) -> int:
        """Blocks that each request adds to storage."""
        return (self.prompt_tokens + self.generate_tokens - 1) // BLOCK_TOKENS - self.hit_tokens // BLOCK_TOKENS

    @property
    def messages(self) -> int:
        """From engines: prepared, legs, pages freed, blocks stored, finished, and one with every token."""
        computed = self.prompt_tokens // BLOCK_TOKENS - self.hit_tokens // BLOCK_TOKENS
        return 3 + (self.hit_tokens > 0) + computed + self.stored_blocks + self.generate_tokens

    def trajectory(self) -> Trajectory:
        """A warm-up round, which leaves the context, and the requests one after another."""
        one = Round(
            append_tokens=self.append_tokens, generate_tokens=self.generate_tokens, keep_tokens=self.context_tokens
        )
        first = Round(append_tokens=self.context_tokens, generate_tokens=1)
        rounds = (first,) if self.context_tokens else (msgspec.structs.replace(one, keep_tokens=None),)
        return Trajectory(id=f"calibrate-{self.name}", rounds=(*rounds, *[one] * self.count))


KINDS = (
    Kind(name="short", count=7, append_tokens=32, generate_tokens=1),
    Kind(name="answer", count=4, append_tokens=32, generate_tokens=32),
    Kind(name="context", count=5, append_tokens=16, generate_tokens=1, context_tokens=CONTEXT_TOKENS),
    Kind(name="blocks", count=4, append_tokens=1024, generate_tokens=1),
    Kind(name="long", count=4, append_tokens=16, generate_tokens=24, context_tokens=CONTEXT_TOKENS),
)
CHOIR = Kind(name="choir", count=1, append_tokens=32, generate_tokens=32)
SINGERS = 8
"""How many of the choir's kind ask at once."""
