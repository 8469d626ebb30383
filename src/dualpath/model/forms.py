"""Which form each layer of a model has, by its config: how its rows are written and attended."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dualpath.kv.layout import KVPart
from dualpath.model.attention import AttentionForm, GroupedForm, LatentForm, LayerQueries
from dualpath.model.rules import PLAIN, AttentionRules, attend_by_rules
from dualpath.model.spans import EXPAND_ROWS
from dualpath.model.sparse import SelectedLatentForm, SparseLatentForm


class UnevenForm:
    """Rows are k‖v, whose heads have different widths (MiMo-V2-Flash: 192 and 128).

    The kernels take one width, so narrow values are widened with zeros, some thousand rows at a time.
    """

    def __init__(self, heads: int, kv_heads: int, key_dim: int, value_dim: int) -> None:
        self.heads, self.kv_heads, self.key_dim, self.value_dim = heads, kv_heads, key_dim, value_dim

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys ``[rows, kv_heads, key_dim]`` and values ``[rows, kv_heads, value_dim]``."""
        values_at = self.kv_heads * self.key_dim
        keys, values = rows[:, :values_at], rows[:, values_at:]
        return self._by_head(keys, self.key_dim), self._by_head(values, self.value_dim)

    def _by_head(self, part: Tensor, dim: int) -> Tensor:
        return part.as_strided((part.shape[0], self.kv_heads, dim), (part.stride(0), dim, 1))

    def paged(self, memory: Tensor) -> Tensor:
        return memory

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._parts(rows)
        keys.index_copy_(0, new_rows, first[0].transpose(0, 1))
        values.index_copy_(0, new_rows, second[0].transpose(0, 1))
        return first, second

    def attend(self, asked: LayerQueries, rules: AttentionRules = PLAIN) -> Tensor:
        width = max(self.key_dim, self.value_dim)
        keys, values = (part.transpose(0, 1) for part in self._parts(asked.rows))

        def keys_values(first: int, count: int) -> tuple[Tensor, Tensor]:
            span = slice(first, first + count)
            return _widened(keys[:, span], width), _widened(values[:, span], width)

        grouped = _widened(asked.query, width).view(self.kv_heads, -1, asked.query.shape[1], width)
        outs = []
        for sequence in asked.sequences:
            chunk = grouped[:, :, sequence.first_query : sequence.first_query + sequence.new_tokens]
            outs.append(attend_by_rules(chunk, sequence, keys_values, asked.scale, rules, EXPAND_ROWS))
        return torch.cat(outs)[..., : self.value_dim]


def _widened(part: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, width - part.shape[-1])) if part.shape[-1] < width else part


def forms_of(config: Any, layer_parts: Sequence[tuple[KVPart, ...]]) -> list[AttentionForm]:
    """Returns the form of each layer, whose rows have these parts; layers that are alike share one."""
    shared = any(len(parts) < len(before) for before, parts in pairwise(layer_parts))
    types = getattr(config, "layer_types", None) or [""] * len(layer_parts)
    made: dict[Any, AttentionForm] = {}
    for parts, kind in zip(layer_parts, types, strict=True):
        whole = kind == "full_attention"
        if (parts, whole) not in made:
            is_latent = parts[0].name == "latent"
            made[parts, whole] = _latent(config, parts, whole, shared) if is_latent else _grouped(config, parts)
    return [made[parts, kind == "full_attention"] for parts, kind in zip(layer_parts, types, strict=True)]


def _latent(config: Any, parts: tuple[KVPart, ...], whole: bool, shared: bool) -> AttentionForm:
    latent = LatentForm(
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )
    index_dim: int | None = getattr(config, "index_head_dim", None)
    if len(parts) == 3:
        return SparseLatentForm(latent, config.index_n_heads, parts[2].dim, shared=shared)
    if index_dim and not whole:
        return SelectedLatentForm(latent, config.index_n_heads, index_dim)
    return latent


def _grouped(config: Any, parts: tuple[KVPart, ...]) -> AttentionForm:
    key, value = parts
    if key.dim != value.dim:
        return UnevenForm(config.num_attention_heads, key.heads, key.dim, value.dim)
    return GroupedForm(config.num_attention_heads, key.heads, key.dim)
