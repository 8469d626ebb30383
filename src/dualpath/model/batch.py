"""A batch of prefill chunks: how it is packed into one forward, and the result of each item."""

import threading
from collections.abc import Callable

import msgspec
from torch import Tensor

from dualpath.model.constraints import TokenConstraints
from dualpath.model.layers import Bytes
from dualpath.model.sampling import TokenDraw, draw
from dualpath.model.scoring import PromptScores
from dualpath.model.spans import PackedSequence
from dualpath.spec.sampling import SamplingParams, finish_reason


class Scored(msgspec.Struct, frozen=True):
    """What is scored at a chunk's positions: `next_token_ids`, and the `top` most likely tokens at each.

    There are as many as the chunk has tokens; one fewer in a prompt's last chunk, after which nothing is known.
    """

    next_token_ids: list[int]
    top: int


class PrefillItem(msgspec.Struct, frozen=True):
    """One chunk of one request: `token_ids` are computed at positions `past_tokens` onwards."""

    token_ids: list[int]
    """The chunk's own tokens, at least one; not those whose KV is loaded."""
    past_tokens: int
    """Tokens before the chunk, whose KV `load_layer` provides: hits and earlier chunks."""
    sampling: SamplingParams | None = None
    """Set for a prompt's last chunk: draw the next token."""
    generated_so_far: int = 0
    """Number of tokens the request has generated before this draw; above 0 for a retried attempt."""
    constraints: TokenConstraints | None = None
    """What bends the draw, where `sampling` has any of it."""
    scored: Scored | None = None
    """Set where the chunk's tokens are scored: log-probabilities of the tokens that follow them."""


class PrefillOutput(msgspec.Struct, frozen=True):
    """The result of one item: an error, or success, with a token if `sampling` was given."""

    error: Exception | None = None
    token: TokenDraw | None = None
    finish_reason: str | None = None
    """Why the token already ends the request, if it does."""
    scores: PromptScores | None = None
    """Of the tokens that follow the chunk's, if the item asked."""


class PrefillBatch:
    """Items packed one after another: item i has buffer rows ``first_rows[i] … + lengths[i]``, cached ones first."""

    def __init__(self, items: list[PrefillItem], rows: int) -> None:
        self.items, self.rows = items, rows
        self.errors: list[Exception | None] = [None] * len(items)
        self.lengths = [item.past_tokens + len(item.token_ids) for item in items]
        self.first_rows: list[int] = []
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.new_rows: list[int] = []
        self.sampled: list[int] = []
        self.sampled_rows: list[int] = []
        self.first_queries: list[int] = []
        """Index in the pack of each item's first new token."""
        self._lock = threading.Lock()
        sequences: list[PackedSequence] = []
        first_row = 0
        for index, (item, length) in enumerate(zip(items, self.lengths, strict=True)):
            extent = (first_row, length)
            sequences.append(
                PackedSequence(len(self.token_ids), len(item.token_ids), item.past_tokens, extents=(extent,))
            )
            self.first_rows.append(first_row)
            self.first_queries.append(len(self.token_ids))
            self.token_ids += item.token_ids
            self.positions += range(item.past_tokens, length)
            self.new_rows += range(first_row + item.past_tokens, first_row + length)
            if item.sampling is not None:
                self.sampled.append(index)
                self.sampled_rows.append(len(self.token_ids) - 1)
            first_row += length
        self.sequences = tuple(sequences)

    def alive(self) -> list[int]:
        with self._lock:
            return [i for i, error in enumerate(self.errors) if error is None]

    def call(
        self,
        callback: Callable[[int, list[Bytes | None]], list[Exception | None]],
        layer: int,
        spans: list[Bytes | None],
    ) -> None:
        """Call an I/O callback and keep each item's first error."""
        asked = [i for i, span in enumerate(spans) if span is not None]
        try:
            errors = callback(layer, spans)
            if len(errors) != len(spans):
                raise ValueError(f"{callback} returned {len(errors)} results for {len(spans)} items")
        except Exception as error:
            errors = [error] * len(spans)
        with self._lock:
            for i in asked:
                self.errors[i] = self.errors[i] or errors[i]

    def outputs(self, logits: Tensor | None, scores: dict[int, PromptScores]) -> list[PrefillOutput]:
        """`logits` are of the sampled rows; `scores` of the items that asked for them."""
        drawn: dict[int, TokenDraw | Exception] = {}
        if logits is not None and self.sampled:
            params = [p for i in self.sampled if (p := self.items[i].sampling) is not None]
            items = [self.items[i] for i in self.sampled]
            tokens = draw(logits, params, [i.generated_so_far for i in items], [i.constraints for i in items])
            drawn = dict(zip(self.sampled, tokens, strict=True))
        return [self._output(i, drawn.get(i), scores.get(i)) for i in range(len(self.items))]

    def _output(self, index: int, drawn: TokenDraw | Exception | None, scores: PromptScores | None) -> PrefillOutput:
        error = self.errors[index] or (drawn if isinstance(drawn, Exception) else None)
        if error is not None or not isinstance(drawn, TokenDraw):
            return PrefillOutput(error=error, scores=scores)
        item = self.items[index]
        assert item.sampling is not None
        reason = finish_reason(item.sampling, drawn.token_id, item.generated_so_far + 1)
        return PrefillOutput(token=drawn, finish_reason=reason, scores=scores)
