"""Attention under a layer's own rules: a sliding window, attention sinks, capped scores. Exact, like `spans`.

*Window.* A token sees itself and the ``window_tokens − 1`` tokens before it. A decode step reads those rows only. Of a
chunk, the tokens at positions below the window see all before them: plain spans. Every later token sees exactly
`window_tokens` rows. These are computed in equal blocks, many in one call. A block's rows are the old ones, which
leave the window one by one (masked); those that all its tokens see (no mask); and its own (masked). The blocks of a
call are overlapping views of the buffer, so nothing is copied and no row outside the windows is read.

*Sinks.* A sink is a score of a head that takes weight and has no value: one more part to merge, zero, whose log-sum-exp
is the sink.

*Cap.* A score s becomes ``cap · tanh(s / cap)``. The CPU's fused kernel can't do that, so these layers use matrix
products, of a bounded number of scores at a time.
"""

from functools import partial

import msgspec
import torch
from torch import Tensor

from dualpath.model.spans import (
    KeysValues,
    PackedSequence,
    attend_chunk,
    attend_token,
    chunk_parts,
    merge,
    partial_by_matmul,
)

BLOCK_TOKENS = 256
"""Most new tokens of a block. Shorter blocks mask less of a window; longer ones make larger matrix products."""

SCORES = 2**24
"""Scores held at a time where no fused kernel is used: 64 MiB of float32."""

Parts = list[tuple[Tensor, Tensor]]


class AttentionRules(msgspec.Struct, frozen=True, eq=False):
    """What a layer's attention does besides plain causal attention; None is nothing."""

    window_tokens: int | None = None
    """How many tokens a token sees, itself included."""
    softcap: float | None = None
    """Bound of a score's size, approached smoothly."""
    sinks: Tensor | None = None
    """One score per query head, ``[heads]``."""

    def __post_init__(self) -> None:
        if self.window_tokens is not None and self.window_tokens < 1:
            raise ValueError(f"a sliding window of {self.window_tokens} tokens; a token sees itself at least")


PLAIN = AttentionRules()


def attend_by_rules(
    query: Tensor,
    sequence: PackedSequence,
    keys_values: KeysValues,
    scale: float,
    rules: AttentionRules,
    span_rows: int | None = None,
) -> Tensor:
    """One sequence's attention: query ``[kv_heads, group, new_tokens, dim]`` → ``[new_tokens, heads, dim]``.

    `span_rows` bounds what is asked of `keys_values` at a time, where a chunk does not need more.
    """
    past, new = sequence.past_tokens, sequence.new_tokens
    if new == 1:
        seen = sequence.extents if rules.window_tokens is None else _latest(sequence.extents, rules.window_tokens)
        return attend_token(query, seen, keys_values, scale, rules.softcap, rules.sinks)
    if rules is PLAIN:
        return attend_chunk(query, sequence, keys_values, scale, span_rows)
    ruled = _Ruled(query, keys_values, scale, rules, span_rows)
    window = rules.window_tokens or past + new
    early = min(max(window - past, 0), new)
    first, _ = sequence.extents[0]
    outs = []
    if early:
        extents = ((first, past + early),)
        outs.append(ruled.all_before(query[:, :, :early], PackedSequence(0, early, past, extents)))
    if early < new:
        outs.append(ruled.windows(query[:, :, early:], first + past + early - window + 1, window))
    return torch.cat(outs)


def _latest(extents: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[int, int], ...]:
    """Returns `extents` without the rows before their last `tokens` ones."""
    kept: list[tuple[int, int]] = []
    for first, rows in reversed(extents):
        taken = min(rows, tokens)
        if taken:
            kept.append((first + rows - taken, taken))
        tokens -= taken
    return tuple(reversed(kept))


class _Ruled:
    """One layer's rows under its rules."""

    def __init__(
        self, query: Tensor, keys_values: KeysValues, scale: float, rules: AttentionRules, span_rows: int | None
    ) -> None:
        self.keys_values, self.scale, self.rules, self.span_rows = keys_values, scale, rules, span_rows
        self.device, self.dtype = query.device, query.dtype
        self.fused = query.device.type == "cpu" and rules.softcap is None

    def all_before(self, query: Tensor, sequence: PackedSequence) -> Tensor:
        """Attention of tokens that see all rows up to their own. Returns ``[new_tokens, heads, dim]``."""
        kv_heads, group, new, _ = query.shape
        if self.rules.softcap is None:
            parts = chunk_parts(query, sequence, self.keys_values, self.scale, self.span_rows)
            return self._joined(parts)
        capped = partial(partial_by_matmul, softcap=self.rules.softcap)
        outs = []
        for start in range(0, new, BLOCK_TOKENS):
            size = min(BLOCK_TOKENS, new - start)
            past = sequence.past_tokens + start
            block = PackedSequence(0, size, past, ((sequence.extents[0][0], past + size),))
            span_rows = self._span_rows(kv_heads * group * size)
            part = query[:, :, start : start + size]
            parts = chunk_parts(part, block, self.keys_values, self.scale, span_rows, capped)
            outs.append(self._joined(parts))
        return torch.cat(outs)

    def windows(self, query: Tensor, first_row: int, window: int) -> Tensor:
        """Attention of tokens that see `window` rows each, the first of them from `first_row` on."""
        kv_heads, group, new, _ = query.shape
        most = max(1, min(BLOCK_TOKENS, window - 1))
        most_blocks = new if self.fused else max(1, SCORES // (kv_heads * group * most * window))
        if self.span_rows is not None:
            most_blocks = min(most_blocks, max(1, (self.span_rows - window) // most))
        outs = []
        done = 0
        while done < new:
            size = min(most, new - done)
            tokens = size * min((new - done) // size, most_blocks)
            outs.append(self._blocks(query[:, :, done : done + tokens], first_row + done, window, size))
            done += tokens
        return torch.cat(outs)

    def _blocks(self, query: Tensor, first_row: int, window: int, size: int) -> Tensor:
        """Attention of blocks of `size` tokens, at most ``window − 1`` unless that is 0."""
        kv_heads, group, new, dim = query.shape
        blocks = new // size
        by_block = query.reshape(kv_heads, group, blocks, size, dim).permute(2, 0, 1, 3, 4)
        folded = by_block.reshape(blocks, kv_heads, group * size, dim)
        keys, values = self.keys_values(first_row, new + window - 1)
        parts: Parts = []
        for offset, count, mask in self._pieces(window, size, kv_heads * group * new):
            seen_keys, seen_values = (
                x[:, offset : offset + new - size + count].unfold(1, count, size).permute(1, 0, 3, 2)
                for x in (keys, values)
            )
            folded_mask = None if mask is None else mask.repeat(group, 1)[None, None]
            out, lse = self._masked(folded, seen_keys, seen_values, folded_mask)
            parts.append((out.view(by_block.shape), lse.reshape(by_block.shape[:-1])))
        return self._joined(parts)

    def _pieces(self, window: int, size: int, queries: int) -> list[tuple[int, int, Tensor | None]]:
        """Returns ``(first row, rows, mask)`` of a block's rows, relative to the oldest row it sees."""
        visible = torch.ones(size, size, dtype=torch.bool, device=self.device)
        pieces: list[tuple[int, int, Tensor | None]] = [(window - 1, size, self._mask(visible.tril()))]
        if window == 1:
            return pieces
        pieces.append((0, size, self._mask(visible.triu())))
        step = window if self.fused else self._span_rows(queries)
        return pieces + [(start, min(step, window - 1 - start), None) for start in range(size, window - 1, step)]

    def _mask(self, visible: Tensor) -> Tensor:
        hidden = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        return hidden.masked_fill_(~visible, -torch.inf)

    def _masked(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, 0.0, False, attn_mask=mask, scale=self.scale
            )
            return out, lse
        return partial_by_matmul(query, keys, values, self.scale, False, self.rules.softcap, mask)

    def _span_rows(self, queries: int) -> int:
        """Returns how many rows `queries`, counted over all heads, may be scored with at a time."""
        return min(max(64, SCORES // queries), self.span_rows or SCORES)

    def _joined(self, parts: Parts) -> Tensor:
        """Merge parts ``[(blocks,) kv_heads, group, tokens, dim]``, and the sinks. Returns ``[tokens, heads, dim]``."""
        out, lse = parts[0]
        if self.rules.sinks is not None:
            sinks = self.rules.sinks.to(lse.dtype).view(*out.shape[-4:-2], 1)
            parts = [*parts, (torch.zeros_like(out), sinks.expand_as(lse))]
        merged = merge(parts)
        tokens_first = merged.movedim(-2, -4)
        return tokens_first.reshape(-1, out.shape[-4] * out.shape[-3], out.shape[-1])
