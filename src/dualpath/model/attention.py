"""Attention that reads KV from our own buffers: the part of the Transformers seam that computes.

Theory of operation. A forward packs several sequences, each with its own cached context, into one row of tokens
``[1, heads, tokens, dim]``. Everything in a transformer but attention is per token, so packing costs nothing there.
Transformers calls us twice per layer. ``past_key_values.update(k, v, layer)`` is `PackedPass.update`: it writes the new
tokens' KV into the layer's device buffer, rows ``[row, elements]`` whose bytes are exactly those of a Layer Block.
Then the registered attention function, `packed_attention`, reads each sequence's KV, cached and new, as strided views
of that buffer. No context is ever copied, padded or converted, and no mask spans it. A layer's sliding window, sinks
and cap of scores reach us as arguments, and go on as `rules`.

A row has one of two forms. *Grouped* (GQA, MHA, MQA): a row is k‖v. *Latent* (MLA): a row is latent‖rope. It is either
absorbed (queries are projected into latent space, so one row is the only key and value of all heads) or expanded to
ordinary keys and values, whichever takes fewer FLOPs for the chunk; decode always absorbs. A latent row may have an
index key as its third part, by which a query selects the rows it attends to; `sparse` has that form.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from dualpath.model.rules import PLAIN, AttentionRules, attend_by_rules
from dualpath.model.spans import EXPAND_ROWS, PackedSequence

IMPLEMENTATION = "dualpath_packed"
"""Our name in Transformers' attention registry."""

_UNSUPPORTED = {"position_bias": "position biases"}


class UnsupportedModelError(ValueError):
    """A model whose attention does not fit the seam; the message says which part."""


class LayerQueries(msgspec.Struct, frozen=True, eq=False):
    """What a layer asks of its form: the attention of a pack."""

    module: Any
    """Transformers' attention module."""
    query: Tensor
    """``[heads, tokens, dim]``."""
    rows: Tensor
    sequences: tuple[PackedSequence, ...]
    """All of the pack's, in its order."""
    scale: float


class AttentionForm(Protocol):
    """How a token's row is written and read; one per kind of attention.

    `rows` are a layer's buffer: ``[rows, elements]``, or what `paged` made of that.
    """

    def paged(self, memory: Tensor) -> Tensor:
        """Returns `memory` ``[rows, elements]`` as the rows of a decode engine, in the order that it reads fastest.

        ``[rows, …]``; the elements of a row, flattened, are those of a Layer Block's row.
        """
        ...

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write the arguments of `update` into ``rows[new_rows]``. Returns what the model's code continues with."""
        ...

    def attend(self, asked: LayerQueries, rules: AttentionRules = PLAIN) -> Tensor:
        """Returns the output ``[tokens, heads, value_dim]``."""
        ...


class SelectingForm:
    """A base of forms whose layers attend to what an indexer selects for each query; see `sparse`."""

    def attend_selected(self, asked: LayerQueries, selection: Any) -> Tensor:
        """As `attend`, over what `selection` selects: a result of `store_index`, in this layer or one before."""
        raise NotImplementedError


class IndexedForm(SelectingForm):
    """A base of those whose layers have an indexer, and keep a key per token for it."""

    def store_index(self, rows: Tensor, new_rows: Tensor, keys: Tensor) -> Any:
        """Write the keys ``[1, tokens, dim]`` of `update_indexer` into ``rows[new_rows]``. Returns what the model's
        indexer continues with, and hands to the attention function as `indices`."""
        raise NotImplementedError


class PackedPass:
    """One packed forward, given to the model as its `past_key_values`. Subclasses say where a layer's rows are."""

    def __init__(self, forms: Sequence[AttentionForm], sequences: tuple[PackedSequence, ...], new_rows: Tensor) -> None:
        """`forms` are those of the layers; `new_rows` ``[tokens]`` int64: the buffer row of each new token."""
        self._forms = forms
        self.sequences = sequences
        self._new_rows = new_rows
        self._rows: Tensor | None = None

    def layer_rows(self, layer: int) -> Tensor:
        """Returns a layer's device buffer ``[rows, elements]`` with every cached row in it; may wait for them."""
        raise NotImplementedError

    def written(self, layer: int) -> None:
        """The new rows of `layer` are in its buffer."""

    def attended(self, layer: int) -> None:
        """This pass no longer reads the buffer of `layer`."""

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Transformers calls this before a layer's attention: `[1, heads, tokens, dim]`, k and v or latent and rope."""
        self._rows, form = self.layer_rows(layer_idx), self._forms[layer_idx]
        passed_on = form.store(self._rows, self._new_rows, first, second)
        if not isinstance(form, IndexedForm):
            self.written(layer_idx)
        return passed_on

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Any:
        """Transformers calls this after `update` in a layer with an indexer: `[1, tokens, dim]`."""
        form = self._forms[layer_idx]
        if not isinstance(form, IndexedForm) or self._rows is None:
            raise UnsupportedModelError(f"layer {layer_idx} has an indexer, which this model's config does not say")
        stands_for_keys = form.store_index(self._rows, self._new_rows, keys)
        self.written(layer_idx)
        return stands_for_keys

    def passed(self, module: Any, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> None:
        """What the model passes to its attention function comes before each `attend`; see `seam_checks`."""

    def attend(
        self, module: Any, query: Tensor, scale: float, rules: AttentionRules = PLAIN, selection: Any = None
    ) -> Tensor:
        if self._rows is None:
            raise UnsupportedModelError(
                f"layer {module.layer_idx} attends without passing KV to its cache: it shares that of a layer before it"
            )
        form, asked = self._forms[module.layer_idx], LayerQueries(module, query[0], self._rows, self.sequences, scale)
        out: Tensor
        if not isinstance(form, SelectingForm):
            out = form.attend(asked, rules)
        elif rules is not PLAIN:
            raise UnsupportedModelError(f"{type(module).__name__} has an indexer and a window, sinks or capped scores")
        else:
            out = form.attend_selected(asked, selection)
        self._rows = None
        self.attended(module.layer_idx)
        return out[None]


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls. It ignores `key` and `value`: the pass has them in its buffers.

    Raises UnsupportedModelError when the layer needs more than causal attention under `AttentionRules`.
    """
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
    packed.passed(module, key, value, attention_mask)
    return packed.attend(module, query, given["scaling"], _rules_of(module, given), given.get("indices")), None


def _rules_of(module: Any, given: dict[str, Any]) -> AttentionRules:
    """Returns what Transformers' arguments ask of a layer. Raises UnsupportedModelError for what can't be."""
    if given.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} has bidirectional attention; only causal attention is computed"
        )
    window, softcap, sinks = given.get("sliding_window"), given.get("softcap"), given.get("s_aux")
    if window is None and softcap is None and sinks is None:
        return PLAIN
    try:
        return AttentionRules(window, softcap, sinks)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(module).__name__} has {error}") from error


class GroupedForm:
    """Rows are k‖v, `kv_heads` heads of `head_dim` each."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

    def paged(self, memory: Tensor) -> Tensor:
        """``[rows, 2, kv_heads, head_dim]``, each head apart: a decode step reads all of one head, then of the next."""
        return memory.view(2, self.kv_heads, -1, self.head_dim).permute(2, 0, 1, 3)

    def _parts(self, rows: Tensor) -> Tensor:
        return rows if rows.dim() == 4 else rows.view(-1, 2, self.kv_heads, self.head_dim)

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._parts(rows)
        parts[:, 0].index_copy_(0, new_rows, first[0].transpose(0, 1))
        parts[:, 1].index_copy_(0, new_rows, second[0].transpose(0, 1))
        return first, second

    def attend(self, asked: LayerQueries, rules: AttentionRules = PLAIN) -> Tensor:
        keys, values = self._parts(asked.rows).permute(1, 2, 0, 3).unbind()

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            return keys[:, first : first + count], values[:, first : first + count]

        grouped = asked.query.view(self.kv_heads, -1, asked.query.shape[1], self.head_dim)
        outs = []
        for sequence in asked.sequences:
            chunk = grouped[:, :, sequence.first_query : sequence.first_query + sequence.new_tokens]
            outs.append(attend_by_rules(chunk, sequence, keys_values, asked.scale, rules))
        return torch.cat(outs)


class LatentForm:
    """Rows are latent‖rope (MLA); `kv_b_proj` of the layer turns a latent into every head's key and value."""

    def __init__(self, heads: int, rank: int, rope_dim: int, nope_dim: int, value_dim: int) -> None:
        self.heads, self.rank, self.rope_dim, self.nope_dim, self.value_dim = heads, rank, rope_dim, nope_dim, value_dim

    def paged(self, memory: Tensor) -> Tensor:
        return memory

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        rows[:, : self.rank].index_copy_(0, new_rows, first[0, 0])
        rows[:, self.rank :].index_copy_(0, new_rows, second[0, 0])
        # The model's code expands what it gets back, to no use; one token is the least that it accepts.
        return first[:, :, :1], second[:, :, :1]

    def attend(self, asked: LayerQueries, rules: AttentionRules = PLAIN) -> Tensor:
        out = asked.query.new_empty((asked.query.shape[1], self.heads, self.value_dim))
        for sequence in asked.sequences:
            chunk = slice(sequence.first_query, sequence.first_query + sequence.new_tokens)
            how = self._absorbed if self.absorbs(sequence.new_tokens) else self._expanded
            out[chunk] = how(asked, asked.query[:, chunk], sequence, rules)
        return out

    def absorbs(self, new_tokens: int) -> bool:
        """Returns True when attending in latent space takes fewer FLOPs per context row than expanding the row."""
        widened = 2 * self.rank - self.nope_dim - self.value_dim
        return new_tokens * widened <= self.rank * (self.nope_dim + self.value_dim)

    def _absorbed(self, asked: LayerQueries, query: Tensor, sequence: PackedSequence, rules: AttentionRules) -> Tensor:
        to_key, to_value = self._projections(asked.module)
        latent_query = self._latent_query(query, to_key)

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            span = asked.rows[None, first : first + count]
            return span, span  # a value is the latent part; its rope part is dropped from the output below

        out = attend_by_rules(latent_query[None], sequence, keys_values, asked.scale, rules)
        latent_out = out[..., : self.rank].transpose(0, 1)
        return torch.bmm(latent_out, to_value.transpose(1, 2)).transpose(0, 1)

    def _expanded(self, asked: LayerQueries, query: Tensor, sequence: PackedSequence, rules: AttentionRules) -> Tensor:
        to_key, to_value = self._projections(asked.module)
        rows = asked.rows
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
        out = attend_by_rules(padded[:, None], sequence, keys_values, asked.scale, rules, EXPAND_ROWS)
        return out[..., : self.value_dim]

    def _latent_query(self, query: Tensor, to_key: Tensor) -> Tensor:
        """A query ``[heads, tokens, nope + rope]`` in latent space: ``[heads, tokens, rank + rope]``."""
        return torch.cat((torch.bmm(query[..., : self.nope_dim], to_key), query[..., self.nope_dim :]), dim=-1)

    def _projections(self, module: Any) -> tuple[Tensor, Tensor]:
        """``kv_b_proj`` as per-head matrices: to keys ``[heads, nope, rank]``, to values ``[heads, value, rank]``."""
        weight: Tensor = module.kv_b_proj.weight
        by_head = weight.view(self.heads, self.nope_dim + self.value_dim, self.rank)
        return by_head[:, : self.nope_dim], by_head[:, self.nope_dim :]
