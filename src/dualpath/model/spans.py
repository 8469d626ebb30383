"""Exact attention of one sequence of a pack, merged from spans of buffer rows.

A chunk of `n` new tokens after `c` cached ones attends to spans: the cached rows without a mask, the new rows causally.
Each span gives an output and the log-sum-exp of its scores, which suffice to merge the spans exactly; the same merge
joins the extents of a paged sequence. Query heads that share a KV head are folded into the query's token axis where
there is no mask, so no KV is repeated.
"""

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

STREAM_BYTES = 2 << 20
"""Decode reads a context in pieces of about this many bytes, which stays in the CPU's cache (see `_stream`)."""

EXPAND_ROWS = 4096
"""Latents expanded at a time, which bounds the scratch memory of MLA prefill."""

KeysValues = Callable[[int, int], tuple[Tensor, Tensor]]
"""``(first_row, rows)`` → keys and values ``[kv_heads, rows, dim]`` of equal `dim`."""

Partial = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
"""Attention over one span: ``(query, keys, values, scale, causal)`` → output and log-sum-exp."""


class PackedSequence(msgspec.Struct, frozen=True):
    """Where one sequence lies in a packed forward and in the layer buffers."""

    first_query: int
    new_tokens: int
    past_tokens: int
    extents: tuple[tuple[int, int], ...]
    """Runs of buffer rows ``(first_row, rows)``, in token order, covering cached then new tokens. A chunk of more than
    one new token has a single extent."""


def attend_sequence(
    query: Tensor,
    rows: Tensor,
    sequence: PackedSequence,
    keys_values: KeysValues,
    scale: float,
    span_rows: int | None = None,
) -> Tensor:
    """Query ``[kv_heads, group, new_tokens, dim]`` → output ``[new_tokens, heads, dim]``; spans are merged exactly."""
    kv_heads, group, new_tokens, dim = query.shape
    parts = sequence_parts(query, rows, sequence, keys_values, scale, span_rows)
    return merge(parts).permute(2, 0, 1, 3).reshape(new_tokens, kv_heads * group, dim)


def sequence_parts(
    query: Tensor,
    rows: Tensor,
    sequence: PackedSequence,
    keys_values: KeysValues,
    scale: float,
    span_rows: int | None = None,
    partial: Partial | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What `attend_sequence` merges: of each span, output ``[kv_heads, group, new_tokens, dim]`` and log-sum-exp.

    `partial` computes one span, by default on the fastest way for plain attention.
    """
    partial = partial or _partial
    kv_heads, group, new_tokens, dim = query.shape
    streams = new_tokens == 1 and rows.device.type == "cpu"
    if streams:
        span_rows = max(64, STREAM_BYTES // (rows.shape[1] * rows.element_size()))
    elif rows.device.type != "cpu":
        span_rows = min(span_rows or EXPAND_ROWS, EXPAND_ROWS)
    parts: list[tuple[Tensor, Tensor]] = []
    folded = query.reshape(1, kv_heads, group * new_tokens, dim)
    spans, causal = _spans(sequence, span_rows)
    for first, count in spans:
        if streams:
            _stream(rows[first : first + count])
        keys, values = keys_values(first, count)
        out, lse = partial(folded, keys[None], values[None], scale, False)
        parts.append((out.view(kv_heads, group, new_tokens, dim), lse.view(kv_heads, group, new_tokens)))
    if causal is not None:
        keys, values = keys_values(*causal)
        keys, values = (x.expand(group, -1, -1, -1) for x in (keys, values))
        out, lse = partial(query.transpose(0, 1), keys, values, scale, True)
        parts.append((out.transpose(0, 1), lse.transpose(0, 1)))
    return parts


def _spans(sequence: PackedSequence, span_rows: int | None) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """Returns row runs of at most `span_rows` without a mask, and the causal run, if any.

    A single new token attends to all of its context, itself included, so it has no causal run.
    """
    whole = list(sequence.extents)
    causal = None
    if sequence.new_tokens > 1:
        first, _ = sequence.extents[0]
        causal = (first + sequence.past_tokens, sequence.new_tokens)
        whole = [(first, sequence.past_tokens)] if sequence.past_tokens else []
    if span_rows is not None:
        whole = [
            (start, min(span_rows, first + count - start))
            for first, count in whole
            for start in range(first, first + count, span_rows)
        ]
    return whole, causal


def _stream(span: Tensor) -> None:
    """Read `span` into the CPU's cache, front to back.

    Per-head views of a row-major context jump from row to row, which defeats the hardware's prefetcher: a decode step
    then waits for memory most of the time. Reading the same bytes in order first is several times faster overall.
    """
    span.sum()


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merge partial attentions ``[…, dim]`` by the log-sum-exp ``[…]`` of each one's scores."""
    if len(parts) == 1:
        return parts[0][0]
    outs, lses = (torch.stack(column) for column in zip(*parts, strict=True))
    weights = lses.softmax(0).to(outs.dtype)
    return (outs * weights[..., None]).sum(0)


def _partial(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of ``[b, h, n, dim]`` over one span ``[b, h, rows, dim]``: output, and log-sum-exp ``[b, h, n]``."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, scale=scale
        )
        return out, lse
    return partial_by_matmul(query, keys, values, scale, causal)


def partial_by_matmul(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    causal: bool,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`_partial` on any device, with all scores of the span in float32 (at most EXPAND_ROWS per unmasked query).

    `softcap` bounds the scores smoothly; then `mask` is added to them.
    """
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores = scores + mask
    if causal:
        n, rows = scores.shape[-2:]
        ahead = torch.ones(n, rows, dtype=torch.bool, device=query.device).triu(rows - n + 1)
        scores = scores.masked_fill(ahead, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(values.dtype)
    return torch.matmul(weights, values), lse
