"""Intra-engine batching of a PE: FIFO packing under a compute quota (paper §6.2).

Data-parallel GPUs synchronise before every MoE layer, so the slowest attention sets the pace. Batches are therefore
limited by *predicted attention time*, not by tokens: theoretical FLOPs times a rate fitted by profiling. Requests are
served first come, first served. A request that would exceed the quota is cut to the largest chunk that still fits, and
the rest of it stays at the head of the line.

The caller takes chunks from the queue and reports each when it is done. A request with a chunk in flight is skipped
until then, because its next chunk needs the KV of this one.
"""

from math import sqrt

import msgspec

from dualpath.core.policy import QUOTA_NS
from dualpath.core.vocabulary import RequestId


class AttentionCost(msgspec.Struct, frozen=True):
    """Predicted time of one attention layer over a batch: ``fixed_ns + Σ flops · ns_per_flop`` (§6.2)."""

    fixed_ns: float
    ns_per_flop: float
    flops_per_token: float
    """FLOPs of the projections, per new token."""
    flops_per_pair: float
    """FLOPs of scores and values, per pair of a new token and a token that it attends to."""

    def chunk_ns(self, past_tokens: int, new_tokens: int) -> float:
        """Time a chunk adds to its batch, without the batch's `fixed_ns`. New token i attends to past_tokens+i+1."""
        pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) // 2
        return (new_tokens * self.flops_per_token + pairs * self.flops_per_pair) * self.ns_per_flop

    def fitting_tokens(self, past_tokens: int, most_tokens: int, budget_ns: float) -> int:
        """Returns the largest chunk up to `most_tokens` whose `chunk_ns` is within the budget; 0 when none is.

        Solves the quadratic in `chunk_ns`, then corrects the rounding of the root by trying its neighbours.
        """
        if self.chunk_ns(past_tokens, most_tokens) <= budget_ns:
            return most_tokens
        if budget_ns <= 0:
            return 0
        linear = self.flops_per_token + self.flops_per_pair * (past_tokens + 0.5)
        flops = budget_ns / self.ns_per_flop
        root = 2 * flops / (linear + sqrt(linear * linear + 2 * self.flops_per_pair * flops))
        tokens = min(int(root), most_tokens)
        while self.chunk_ns(past_tokens, tokens) > budget_ns:
            tokens -= 1
        while tokens < most_tokens and self.chunk_ns(past_tokens, tokens + 1) <= budget_ns:
            tokens += 1
        return tokens


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Compute tokens ``[past_tokens, past_tokens + new_tokens)`` of a request; `last` ends its prompt."""

    request: RequestId
    attempt: int
    past_tokens: int
    new_tokens: int
    last: bool


class _Line:
    """A request in the queue: its computed and its remaining tokens, and whether a chunk of it is in flight."""

    __slots__ = ("attempt", "in_flight", "new_tokens", "past_tokens", "request")

    def __init__(self, request: RequestId, attempt: int, past_tokens: int, new_tokens: int) -> None:
        self.request = request
        self.attempt = attempt
        self.past_tokens = past_tokens
        self.new_tokens = new_tokens
        self.in_flight = False


class PrefillQueue:
    """The requests ready for prefill on one PE. It has no clock and never blocks; only `next_batch` is not O(1)."""

    def __init__(
        self,
        cost: AttentionCost,
        quota_ns: float = QUOTA_NS,
        max_batch_tokens: int = 8192,
        max_batch_requests: int = 64,
        max_batch_kv_tokens: int | None = None,
    ) -> None:
        """`max_batch_tokens` bounds a batch's new tokens; `max_batch_kv_tokens` bounds past and new ones together.

        The latter is the capacity of the device's layer buffers. The request at the head is exempt from it: a driver
        sizes its buffers for the longest prompt it admits. Raises ValueError when a limit is not above zero.
        """
        if min(quota_ns, max_batch_tokens, max_batch_requests) <= 0:
            raise ValueError(
                f"quota_ns {quota_ns}, max_batch_tokens {max_batch_tokens} and max_batch_requests "
                f"{max_batch_requests} must all be above zero"
            )
        self._cost = cost
        self._quota_ns = quota_ns
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_requests = max_batch_requests
        self._max_batch_kv_tokens = max_batch_kv_tokens
        self._lines: dict[tuple[RequestId, int], _Line] = {}
        self.waiting_tokens = 0
        """New tokens not yet in a batch. Read only."""
        self.waiting_requests = 0
        """Requests with new tokens not yet in a batch. Read only."""

    def push(self, request: RequestId, attempt: int, past_tokens: int, new_tokens: int) -> None:
        """Queue a prompt whose first `past_tokens` are in the buffers. Raises ValueError if it is empty or known."""
        if new_tokens < 1 or past_tokens < 0:
            raise ValueError(f"request {request} attempt {attempt}: {new_tokens} new tokens after {past_tokens}")
        key = (request, attempt)
        if key in self._lines:
            raise ValueError(f"request {request} attempt {attempt} is already queued")
        self._lines[key] = _Line(request, attempt, past_tokens, new_tokens)
        self.waiting_tokens += new_tokens
        self.waiting_requests += 1

    def remove(self, request: RequestId, attempt: int) -> bool:
        """Forget a request and its chunk in flight. Returns False when the queue does not have it."""
        line = self._lines.pop((request, attempt), None)
        if line is None:
            return False
        self.waiting_tokens -= line.new_tokens
        self.waiting_requests -= line.new_tokens > 0
        return True

    def chunk_done(self, request: RequestId, attempt: int) -> bool:
        """The chunk in flight is computed and in the DE buffer. Returns False when none is in flight (stale)."""
        key = (request, attempt)
        line = self._lines.get(key)
        if line is None or not line.in_flight:
            return False
        line.in_flight = False
        if not line.new_tokens:
            del self._lines[key]
        return True

    def next_batch(self) -> tuple[Chunk, ...]:
        """Returns the next chunks to compute together, in arrival order; empty when there is nothing to compute.

        The batch's predicted time is within the quota, unless the batch is one token that exceeds it alone.
        """
        batch: list[Chunk] = []
        cost = self._cost
        left_ns = self._quota_ns - cost.fixed_ns
        left_tokens = self._max_batch_tokens
        kv_tokens = 0
        for line in self._lines.values():
            if line.in_flight:
                continue
            if len(batch) == self._max_batch_requests or (batch and self._over_kv(kv_tokens, line)):
                break
            most_tokens = line.new_tokens if line.new_tokens < left_tokens else left_tokens
            new_tokens, spent_ns = most_tokens, cost.chunk_ns(line.past_tokens, most_tokens)
            if spent_ns > left_ns:
                new_tokens = cost.fitting_tokens(line.past_tokens, most_tokens, left_ns) or (0 if batch else 1)
                spent_ns = cost.chunk_ns(line.past_tokens, new_tokens)
            if not new_tokens:
                break
            left_ns -= spent_ns
            left_tokens -= new_tokens
            chunk = _take(line, new_tokens)
            batch.append(chunk)
            self.waiting_tokens -= new_tokens
            if not chunk.last:
                break
            self.waiting_requests -= 1
            kv_tokens += line.past_tokens
        return tuple(batch)

    def _over_kv(self, kv_tokens: int, line: _Line) -> bool:
        limit = self._max_batch_kv_tokens
        return limit is not None and kv_tokens + line.past_tokens + line.new_tokens > limit


def _take(line: _Line, new_tokens: int) -> Chunk:
    chunk = Chunk(line.request, line.attempt, line.past_tokens, new_tokens, new_tokens == line.new_tokens)
    line.past_tokens += new_tokens
    line.new_tokens -= new_tokens
    line.in_flight = True
    return chunk
