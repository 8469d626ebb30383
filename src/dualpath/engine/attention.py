"""Attention that reads KV from our own buffers: the half of the Transformers seam that computes.

Theory of operation. A forward packs several sequences, each with its own cached context, into one row of tokens
``[1, heads, tokens, dim]``. Everything in a transformer but attention is per token, so packing costs nothing there. Two
calls per layer reach us. ``past_key_values.update(k, v, layer)`` is `PackedPass.update`: the new tokens' KV is written
into the layer's device buffer, rows ``[row, token_elems]`` whose bytes are exactly those of a Layer Block. Then the
registered attention function is called: `packed_attention` walks the sequences and reads each one's KV, cached and new,
as strided views of that buffer. No context is ever copied, padded, or converted, and there is no mask.

Two ways to read a row. *Grouped* (GQA, MHA, MQA): a row is k‖v. *Latent* (MLA): a row is latent‖rope, and is either
absorbed (queries are taken into latent space, so that one row is the only key and value of all heads) or expanded to
ordinary keys and values, whichever is fewer FLOPs for the chunk at hand; decode is always absorbed.

A chunk of `n` new tokens after `c` cached ones is attention over spans: the cached rows without a mask, the new rows
causally. Each span gives an output and the log-sum-exp of its scores, which is all it takes to merge them exactly; the
same merge joins the extents of a paged sequence. Query heads that share a KV head are folded into the query's token
axis where there is no mask, so nothing is repeated.
"""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

IMPLEMENTATION = "dualpath_packed"
"""Our name in Transformers' attention registry."""

STREAM_BYTES = 2 << 20
"""Decode reads a context in pieces of about this many bytes, which stays in the CPU's cache (see `_stream`)."""

EXPAND_ROWS = 4096
"""Latents expanded at a time, which bounds the scratch memory of MLA prefill."""

_UNSUPPORTED = {"sliding_window": "sliding-window layers", "softcap": "score soft-capping", "s_aux": "attention sinks"}

KeysValues = Callable[[int, int], tuple[Tensor, Tensor]]
"""``(first_row, rows)`` → keys and values ``[kv_heads, rows, dim]`` of equal `dim`."""


class UnsupportedModelError(ValueError):
    """A model whose attention does not fit the seam; the message says which part."""


class PackedSequence(msgspec.Struct, frozen=True):
    """Where one sequence lies in a packed forward and in the layer buffers."""

    first_query: int
    new_tokens: int
    cached_tokens: int
    extents: tuple[tuple[int, int], ...]
    """Runs of buffer rows ``(first_row, rows)``, in token order, covering cached then new tokens. A chunk of more than
    one new token has a single extent."""


class AttentionForm(Protocol):
    """How a token's row is written and read; one per kind of attention."""

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write what `update` was given into ``rows[new_rows]``; return what the model's code should go on with."""
        ...

    def attend(
        self, module: Any, query: Tensor, rows: Tensor, sequences: tuple[PackedSequence, ...], scale: float
    ) -> Tensor:
        """Query ``[heads, tokens, dim]`` → output ``[tokens, heads, value_dim]``."""
        ...


class PackedPass:
    """One packed forward, handed to the model as its `past_key_values`. Subclasses say where a layer's rows are."""

    def __init__(self, form: AttentionForm, sequences: tuple[PackedSequence, ...], new_rows: Tensor) -> None:
        """`new_rows` ``[tokens]`` int64: the buffer row of each new token of the pack."""
        self.form = form
        self.sequences = sequences
        self._new_rows = new_rows
        self._rows: Tensor | None = None

    def layer_rows(self, layer: int) -> Tensor:
        """The device buffer ``[rows, token_elems]`` of a layer, with every cached row in it; may wait."""
        raise NotImplementedError

    def written(self, layer: int) -> None:
        """The new rows of `layer` are in its buffer."""

    def attended(self, layer: int) -> None:
        """Nothing of this pass reads the buffer of `layer` any more."""

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What Transformers calls before a layer's attention: `[1, heads, tokens, dim]`, k and v or latent and rope."""
        self._rows = self.layer_rows(layer_idx)
        passed_on = self.form.store(self._rows, self._new_rows, first, second)
        self.written(layer_idx)
        return passed_on

    def attend(self, module: Any, query: Tensor, scale: float) -> Tensor:
        assert self._rows is not None, "update comes before attention in every layer"
        out = self.form.attend(module, query[0], self._rows, self.sequences, scale)
        self._rows = None
        self.attended(module.layer_idx)
        return out[None]


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """The attention function Transformers calls; `key` and `value` are ignored, the pass has them in its buffers.

    Raises UnsupportedModelError where the layer asks for something beyond plain causal attention.
    """
    del key, value, attention_mask
    for name, meaning in _UNSUPPORTED.items():
        if given.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {meaning}, which packed attention does not compute"
            )
    packed = given.get("packed")
    if not isinstance(packed, PackedPass):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function; it needs a "
            "Transformers model with attention-backend support"
        )
    return packed.attend(module, query, given["scaling"]), None


class GroupedForm:
    """Rows are k‖v, `kv_heads` heads of `head_dim` each."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        parts = rows.view(-1, 2, self.kv_heads, self.head_dim)
        parts[:, 0].index_copy_(0, new_rows, first[0].transpose(0, 1))
        parts[:, 1].index_copy_(0, new_rows, second[0].transpose(0, 1))
        return first, second

    def attend(
        self, module: Any, query: Tensor, rows: Tensor, sequences: tuple[PackedSequence, ...], scale: float
    ) -> Tensor:
        del module
        heads_first = rows.view(-1, 2, self.kv_heads, self.head_dim).permute(1, 2, 0, 3)

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            keys, values = heads_first[:, :, first : first + count]
            return keys, values

        grouped = query.view(self.kv_heads, -1, query.shape[1], self.head_dim)
        out = query.new_empty((query.shape[1], self.heads, self.head_dim))
        for sequence in sequences:
            chunk = slice(sequence.first_query, sequence.first_query + sequence.new_tokens)
            out[chunk] = _attend_sequence(grouped[:, :, chunk], rows, sequence, keys_values, scale)
        return out


class LatentForm:
    """Rows are latent‖rope (MLA); `kv_b_proj` of the layer turns a latent into every head's key and value."""

    def __init__(self, heads: int, rank: int, rope_dim: int, nope_dim: int, value_dim: int) -> None:
        self.heads, self.rank, self.rope_dim, self.nope_dim, self.value_dim = heads, rank, rope_dim, nope_dim, value_dim

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        rows[:, : self.rank].index_copy_(0, new_rows, first[0, 0])
        rows[:, self.rank :].index_copy_(0, new_rows, second[0, 0])
        # The model's code goes on to expand what it gets back, for nothing: one token's worth is the least it takes.
        return first[:, :, :1], second[:, :, :1]

    def attend(
        self, module: Any, query: Tensor, rows: Tensor, sequences: tuple[PackedSequence, ...], scale: float
    ) -> Tensor:
        out = query.new_empty((query.shape[1], self.heads, self.value_dim))
        for sequence in sequences:
            chunk = slice(sequence.first_query, sequence.first_query + sequence.new_tokens)
            how = self._absorbed if self.absorbs(sequence.new_tokens) else self._expanded
            out[chunk] = how(module, query[:, chunk], rows, sequence, scale)
        return out

    def absorbs(self, new_tokens: int) -> bool:
        """Whether attending in latent space costs fewer FLOPs a context row than expanding the row does."""
        widened = 2 * self.rank - self.nope_dim - self.value_dim
        return new_tokens * widened <= self.rank * (self.nope_dim + self.value_dim)

    def _absorbed(self, module: Any, query: Tensor, rows: Tensor, sequence: PackedSequence, scale: float) -> Tensor:
        to_key, to_value = self._projections(module)
        latent_query = torch.bmm(query[..., : self.nope_dim], to_key)
        latent_query = torch.cat((latent_query, query[..., self.nope_dim :]), dim=-1)

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            span = rows[None, first : first + count]
            return span, span  # a value is the latent part; its rope part is dropped from the output below

        out = _attend_sequence(latent_query[None], rows, sequence, keys_values, scale)
        latent_out = out[..., : self.rank].transpose(0, 1)
        return torch.bmm(latent_out, to_value.transpose(1, 2)).transpose(0, 1)

    def _expanded(self, module: Any, query: Tensor, rows: Tensor, sequence: PackedSequence, scale: float) -> Tensor:
        to_key, to_value = self._projections(module)
        width = max(self.nope_dim + self.rope_dim, self.value_dim)

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            latent = rows[first : first + count, : self.rank].expand(self.heads, -1, -1)
            rope = rows[first : first + count, self.rank :]
            keys = rows.new_zeros((self.heads, count, width))
            keys[..., : self.nope_dim] = torch.bmm(latent, to_key.transpose(1, 2))
            keys[..., self.nope_dim : self.nope_dim + self.rope_dim] = rope
            values = rows.new_zeros((self.heads, count, width))
            values[..., : self.value_dim] = torch.bmm(latent, to_value.transpose(1, 2))
            return keys, values

        padded = torch.nn.functional.pad(query, (0, width - query.shape[-1]))
        out = _attend_sequence(padded[:, None], rows, sequence, keys_values, scale, span_rows=EXPAND_ROWS)
        return out[..., : self.value_dim]

    def _projections(self, module: Any) -> tuple[Tensor, Tensor]:
        """``kv_b_proj`` as per-head matrices: to keys ``[heads, nope, rank]``, to values ``[heads, value, rank]``."""
        weight: Tensor = module.kv_b_proj.weight
        by_head = weight.view(self.heads, self.nope_dim + self.value_dim, self.rank)
        return by_head[:, : self.nope_dim], by_head[:, self.nope_dim :]


def _attend_sequence(
    query: Tensor,
    rows: Tensor,
    sequence: PackedSequence,
    keys_values: KeysValues,
    scale: float,
    span_rows: int | None = None,
) -> Tensor:
    """Query ``[kv_heads, group, new_tokens, dim]`` → output ``[new_tokens, heads, dim]``; spans are merged exactly."""
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
        out, lse = _partial(folded, keys[None], values[None], scale, causal=False)
        parts.append((out.view(kv_heads, group, new_tokens, dim), lse.view(kv_heads, group, new_tokens)))
    if causal is not None:
        keys, values = keys_values(*causal)
        keys, values = (x.expand(group, -1, -1, -1) for x in (keys, values))
        out, lse = _partial(query.transpose(0, 1), keys, values, scale, causal=True)
        parts.append((out.transpose(0, 1), lse.transpose(0, 1)))
    return _merge(parts).permute(2, 0, 1, 3).reshape(new_tokens, kv_heads * group, dim)


def _spans(sequence: PackedSequence, span_rows: int | None) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """Row runs of at most `span_rows` that every new token sees whole, and the run it sees causally, if any.

    A single new token sees all of its context, itself included, so it has no causal run.
    """
    whole = list(sequence.extents)
    causal = None
    if sequence.new_tokens > 1:
        first, _ = sequence.extents[0]
        causal = (first + sequence.cached_tokens, sequence.new_tokens)
        whole = [(first, sequence.cached_tokens)] if sequence.cached_tokens else []
    if span_rows is not None:
        whole = [
            (start, min(span_rows, first + count - start))
            for first, count in whole
            for start in range(first, first + count, span_rows)
        ]
    return whole, causal


def _stream(span: Tensor) -> None:
    """Pull `span` into the CPU's cache front to back.

    Per-head views of a row-major context jump from row to row, which defeats the hardware's prefetcher: a decode step
    then waits for memory most of the time. Reading the same bytes in order first is several times faster overall.
    """
    span.sum()


def _merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Join partial attentions ``[…, dim]`` by the log-sum-exp ``[…]`` of the scores each has seen."""
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    merged = parts[0][0] * weights[0, ..., None].to(parts[0][0].dtype)
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        merged = torch.addcmul(merged, out, weight[..., None].to(out.dtype))
    return merged


def _partial(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of ``[b, h, n, dim]`` over one span ``[b, h, rows, dim]``: output, and log-sum-exp ``[b, h, n]``."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, causal, scale=scale
        )
        return out, lse
    return _partial_by_matmul(query, keys, values, scale, causal)


def _partial_by_matmul(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """The same on any device, with all scores of the span in float32 (at most EXPAND_ROWS a query where unmasked)."""
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    if causal:
        n, rows = scores.shape[-2:]
        ahead = torch.ones(n, rows, dtype=torch.bool, device=query.device).triu(rows - n + 1)
        scores = scores.masked_fill(ahead, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().to(values.dtype)
    return torch.matmul(weights, values), lse
