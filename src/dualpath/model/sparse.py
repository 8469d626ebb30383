"""Sparse attention over latents (DeepSeek-V3.2, GLM-5): a query attends to the k rows that its layer's indexer selects.

A row is latent‖rope‖index; the index key is what the indexer scores. The model's own indexer runs unchanged, once over
the whole pack. It must not select there, for it knows neither where a sequence ends nor where its keys lie. So
`update_indexer` gives it no keys but a `Selection` that stands for them. PyTorch hands each operation on that object
back to us: it notes the index queries and head weights that the model computed, and nothing is evaluated. The model
then passes it to the attention function as its `indices`, where each sequence's rows are known, and `select` scores
them. A model that scores by another formula is refused at load, because the operations it asks for are not the known
ones.

A query with at most k tokens to see selects them all, so those take the dense path, which is exact and reads no index
keys. The others go in pieces that bound the scratch memory; a piece reads all index keys of its context, and k latents
a query.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from dualpath.model.attention import IndexedForm, LatentForm, LayerQueries, SelectingForm, UnsupportedModelError
from dualpath.model.spans import PackedSequence

SCRATCH_BYTES = 64 << 20
"""About the most that a piece's gathered rows and scores take, unless a single query needs more."""

SPAN_ROWS = 4096
"""Index keys scored at a time."""

_FORMULA = ("transpose", "float", "unsqueeze", "matmul", "mul", "relu", "matmul", "squeeze", "add", "topk")
"""What an indexer does with its keys: ``topk(weights · relu(scale · queries · keysᵀ) + mask)``."""


class Selection:
    """Stands for a layer's index keys, then for their scores, then for the top-k of each query of the pack."""

    def __init__(self) -> None:
        self._operations: list[str] = []
        self._factors: list[Tensor] = []
        self._scale = 1.0
        self.top_k = 0
        self.chosen: list[Tensor] = []
        """What was selected, piece after piece, where layers behind this one share it."""
        self.shape = (1, 1, sys.maxsize)
        """The model bounds its top-k by the number of keys; here each sequence has its own."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Selection:
        """PyTorch calls this for its functions with a Selection among their arguments."""
        del types, options
        if function is torch.nn.functional.relu:
            return arguments[0]._did("relu")  # type: ignore[no-any-return]
        if function is torch.matmul and isinstance(arguments[1], Selection):
            arguments[1]._factors.append(arguments[0])
            return arguments[1]._did("matmul")
        raise UnsupportedModelError(f"the indexer uses {function} on its scores, which is not known here")

    def _did(self, operation: str) -> Selection:
        self._operations.append(operation)
        return self

    def transpose(self, *_: int) -> Selection:
        return self._did("transpose")

    def float(self) -> Selection:
        return self._did("float")

    def unsqueeze(self, _: int) -> Selection:
        return self._did("unsqueeze")

    def squeeze(self, _: int) -> Selection:
        return self._did("squeeze")

    def __mul__(self, scale: Any) -> Selection:
        self._scale *= scale
        return self._did("mul")

    def __add__(self, mask: Tensor) -> Selection:
        return self._did("add")

    def topk(self, k: int, dim: int) -> Selection:  # noqa: ARG002  always the keys' dimension
        self.top_k = k
        self._did("topk")
        if tuple(self._operations) != _FORMULA:
            raise UnsupportedModelError(f"the indexer scores by {', '.join(self._operations)}, which is not known here")
        return self

    @property
    def indices(self) -> Selection:
        return self

    def to(self, _: Any) -> Selection:
        return self

    @property
    def queries(self) -> Tensor:
        """``[tokens, index_heads, index_dim]``, float32."""
        return self._factors[0][0]

    @property
    def weights(self) -> Tensor:
        """``[tokens, 1, index_heads]``, float32."""
        return self._factors[1][0]

    def select(self, keys: Tensor, part: PackedSequence) -> Tensor:
        """Returns the buffer rows ``[new_tokens, top_k]`` for the queries of `part`, each of which sees more than that.

        `keys` ``[rows, index_dim]`` is the index part of the layer's buffer.
        """
        chunk = slice(part.first_query, part.first_query + part.new_tokens)
        queries, weights = self.queries[chunk], self.weights[chunk]
        scores = queries.new_empty((part.new_tokens, part.past_tokens + part.new_tokens))
        done = 0
        for first, count in _spans(part.extents):
            span = keys[first : first + count].float()
            by_head = torch.matmul(queries.flatten(0, 1), span.T).mul_(self._scale).relu_()
            torch.matmul(weights, by_head.view(part.new_tokens, -1, count), out=scores[:, None, done : done + count])
            done += count
        if part.new_tokens > 1:
            new = scores[:, part.past_tokens :]
            new.masked_fill_(torch.ones_like(new, dtype=torch.bool).triu_(1), -torch.inf)
        return _buffer_rows(scores.topk(self.top_k, sorted=False).indices, part.extents)


class SelectedLatentForm(LatentForm, SelectingForm):
    """Rows are latent‖rope, and the selection is that of a layer before, whose rows lie as this layer's do."""

    def __init__(self, latent: LatentForm, index_heads: int, index_dim: int) -> None:
        super().__init__(latent.heads, latent.rank, latent.rope_dim, latent.nope_dim, latent.value_dim)
        self.index_heads, self.index_dim = index_heads, index_dim
        self._width = latent.rank + latent.rope_dim

    def attend_selected(self, asked: LayerQueries, selection: Any) -> Tensor:
        latents = asked.rows[:, : self._width]
        dense, sparse = _by_length(asked.sequences, selection.top_k)
        out = self.attend(msgspec.structs.replace(asked, rows=latents, sequences=dense))
        pieces = _pieces(sparse, self._piece_queries(sparse, selection.top_k, latents.element_size()))
        for number, piece in enumerate(pieces):
            places = torch.cat([torch.arange(p.first_query, p.first_query + p.new_tokens) for p in piece])
            places = places.to(latents.device)
            chosen = self._chosen(asked.rows, selection, number, piece)
            out[places] = self._over_chosen(asked.module, asked.query[:, places], latents, chosen, asked.scale)
        return out

    def _chosen(self, rows: Tensor, selection: Any, number: int, piece: list[PackedSequence]) -> Tensor:
        """Returns the buffer rows ``[queries, top_k]`` of a piece's queries."""
        del rows, piece
        chosen: Tensor = selection.chosen[number]
        return chosen

    def _piece_queries(self, sequences: tuple[PackedSequence, ...], top_k: int, itemsize_bytes: int) -> int:
        """Returns how many queries' gathered rows, attention scores and index scores fit in the scratch memory."""
        context = max((s.past_tokens + s.new_tokens for s in sequences), default=1)
        attention = top_k * (self._width * itemsize_bytes + self.heads * 8)
        index = (min(context, SPAN_ROWS) * self.index_heads + 2 * context) * 4
        return max(1, SCRATCH_BYTES // (attention + index))

    def _over_chosen(self, module: Any, query: Tensor, latents: Tensor, chosen: Tensor, scale: float) -> Tensor:
        """Absorbed attention, each query over rows of its own: ``chosen[query]``."""
        to_key, to_value = self._projections(module)
        latent_query = self._latent_query(query, to_key).transpose(0, 1)
        gathered = latents.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
        scores = torch.bmm(latent_query, gathered.transpose(1, 2)).float().mul_(scale)
        latent_out = torch.bmm(scores.softmax(-1).to(gathered.dtype), gathered[..., : self.rank])
        return torch.bmm(latent_out.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)


class SparseLatentForm(SelectedLatentForm, IndexedForm):
    """Rows are latent‖rope‖index; see the module docstring."""

    def __init__(self, latent: LatentForm, index_heads: int, index_dim: int, *, shared: bool) -> None:
        """`shared`: layers behind it may use its selection."""
        super().__init__(latent, index_heads, index_dim)
        self._shared = shared

    def store(self, rows: Tensor, new_rows: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return super().store(rows[:, : self._width], new_rows, first, second)

    def store_index(self, rows: Tensor, new_rows: Tensor, keys: Tensor) -> Selection:
        rows[:, self._width :].index_copy_(0, new_rows, keys[0])
        return Selection()

    def _chosen(self, rows: Tensor, selection: Any, number: int, piece: list[PackedSequence]) -> Tensor:
        del number
        keys = rows[:, self._width :]
        chosen = torch.cat([selection.select(keys, part) for part in piece])
        if self._shared:
            selection.chosen.append(chosen.int())
        return chosen


def _by_length(
    sequences: tuple[PackedSequence, ...], top_k: int
) -> tuple[tuple[PackedSequence, ...], tuple[PackedSequence, ...]]:
    """Split each sequence's queries into those that see at most `top_k` tokens and those that see more."""
    dense: list[PackedSequence] = []
    sparse: list[PackedSequence] = []
    for sequence in sequences:
        short = min(max(0, top_k - sequence.past_tokens), sequence.new_tokens)
        if short:
            dense.append(_part(sequence, 0, short))
        if short < sequence.new_tokens:
            sparse.append(_part(sequence, short, sequence.new_tokens - short))
    return tuple(dense), tuple(sparse)


def _pieces(sequences: tuple[PackedSequence, ...], most_queries: int) -> Iterator[list[PackedSequence]]:
    """Cut and join sequences into pieces of `most_queries` queries, the last of fewer."""
    piece: list[PackedSequence] = []
    room = most_queries
    for sequence in sequences:
        done = 0
        while done < sequence.new_tokens:
            count = min(room, sequence.new_tokens - done)
            piece.append(_part(sequence, done, count))
            done, room = done + count, room - count
            if not room:
                yield piece
                piece, room = [], most_queries
    if piece:
        yield piece


def _part(sequence: PackedSequence, first: int, count: int) -> PackedSequence:
    """Queries ``first … first + count`` of `sequence`, with what they see and no more."""
    past = sequence.past_tokens + first
    left = past + count
    extents: list[tuple[int, int]] = []
    for first_row, rows in sequence.extents:
        if left > 0:
            extents.append((first_row, min(rows, left)))
        left -= rows
    return PackedSequence(sequence.first_query + first, count, past, tuple(extents))


def _spans(extents: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    for first, count in extents:
        for start in range(first, first + count, SPAN_ROWS):
            yield start, min(SPAN_ROWS, first + count - start)


def _buffer_rows(tokens: Tensor, extents: tuple[tuple[int, int], ...]) -> Tensor:
    """Where a sequence's tokens, counted from its first, lie in the layer's buffer."""
    if len(extents) == 1:
        return tokens + extents[0][0]
    stops = torch.tensor([count for _, count in extents]).cumsum(0)
    shifts = torch.tensor([first + count for first, count in extents]) - stops
    return tokens + shifts.to(tokens.device)[torch.bucketize(tokens, stops.to(tokens.device), right=True)]
