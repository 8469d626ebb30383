"""Exact attention of one sequence of a pack over its buffer rows.

A chunk of `n` new tokens after `c` cached ones attends to spans: the cached rows without a mask, the new rows causally.
Each span gives an output and the log-sum-exp of its scores, which suffice to merge the spans exactly. A single new
token sees all rows, so it needs neither mask nor merge: its scores of all extents go through one softmax. Query heads
that share a KV head are folded into the query's token axis where there is no mask, so no KV is repeated.
"""

from collections.abc import Callable

import msgspec
import torch
from torch import Tensor

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


def attend_token(
    query: Tensor,
    extents: tuple[tuple[int, int], ...],
    keys_values: KeysValues,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one token to all rows of `extents`: query ``[kv_heads, group, 1, dim]`` → ``[1, heads, dim]``.

    `softcap` bounds the scores smoothly; `sinks` ``[heads]`` are scores that take weight and have no value.
    """
    kv_heads, group, _, dim = query.shape
    by_kv_head = query.view(kv_heads, group, dim)
    spans = [keys_values(*extent) for extent in extents]
    if query.dtype == torch.float32 or softcap is not None:
        out = _by_one_softmax(by_kv_head * scale, spans, softcap, sinks)
    else:  # a matrix product of few rows in half precision is slow on a CPU, its fused kernel is not
        parts = [_partial(by_kv_head[None], keys[None], values[None], scale, False) for keys, values in spans]
        if sinks is not None:
            parts.append((torch.zeros_like(parts[0][0]), sinks.to(parts[0][1].dtype).view(1, kv_heads, group)))
        out = merge(parts)
    return out.view(1, kv_heads * group, dim)


def _by_one_softmax(
    scaled: Tensor, spans: list[tuple[Tensor, Tensor]], softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of a query ``[kv_heads, group, dim]``, times its scale, by matrix products over whole spans."""
    scores = [torch.bmm(scaled, keys.transpose(1, 2)).float() for keys, _ in spans]
    if softcap is not None:
        scores = [score.div_(softcap).tanh_().mul_(softcap) for score in scores]
    if sinks is not None:
        scores.append(sinks.float().view(*scaled.shape[:2], 1))
    if len(scores) == 1:
        return torch.bmm(scores[0].softmax(-1).to(scaled.dtype), spans[0][1])
    joined = torch.cat(scores, dim=-1).softmax(-1).to(scaled.dtype)
    weights = torch.split(joined, [score.shape[-1] for score in scores], dim=-1)
    out = torch.bmm(weights[0], spans[0][1])
    for weight, (_, values) in zip(weights[1:], spans[1:], strict=False):
        out.baddbmm_(weight, values)
    return out


def attend_chunk(
    query: Tensor, sequence: PackedSequence, keys_values: KeysValues, scale: float, span_rows: int | None = None
) -> Tensor:
    """Query ``[kv_heads, group, new_tokens, dim]`` → output ``[new_tokens, heads, dim]``; spans are merged exactly."""
    kv_heads, group, new_tokens, dim = query.shape
    parts = chunk_parts(query, sequence, keys_values, scale, span_rows)
    return merge(parts).permute(2, 0, 1, 3).reshape(new_tokens, kv_heads * group, dim)


def chunk_parts(
    query: Tensor,
    sequence: PackedSequence,
    keys_values: KeysValues,
    scale: float,
    span_rows: int | None = None,
    partial: Partial | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What `attend_chunk` merges: of each span, output ``[kv_heads, group, new_tokens, dim]`` and log-sum-exp.

    `partial` computes one span, by default on the fastest way for plain attention.
    """
    partial = partial or _partial
    kv_heads, group, new_tokens, dim = query.shape
    if query.device.type != "cpu":
        span_rows = min(span_rows or EXPAND_ROWS, EXPAND_ROWS)
    parts: list[tuple[Tensor, Tensor]] = []
    folded = query.reshape(1, kv_heads, group * new_tokens, dim)
    ((first, _),) = sequence.extents
    new = first + sequence.past_tokens
    for start in range(first, new, span_rows or max(1, sequence.past_tokens)):
        keys, values = keys_values(start, min(span_rows or new, new - start))
        out, lse = partial(folded, keys[None], values[None], scale, False)
        parts.append((out.view(kv_heads, group, new_tokens, dim), lse.view(kv_heads, group, new_tokens)))
    keys, values = (x.expand(group, -1, -1, -1) for x in keys_values(new, new_tokens))
    out, lse = partial(query.transpose(0, 1), keys, values, scale, True)
    return [*parts, (out.transpose(0, 1), lse.transpose(0, 1))]


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
