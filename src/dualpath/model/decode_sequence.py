"""One sequence that a decode engine decodes, and what a step gives it."""

import msgspec

from dualpath.model.constraints import TokenConstraints
from dualpath.model.grammar import GrammarError
from dualpath.model.paged import Extent
from dualpath.model.sampling import TokenDraw
from dualpath.model.spans import PackedSequence
from dualpath.spec.sampling import SamplingParams, finish_reason


class StepOutput(msgspec.Struct, frozen=True):
    """One sequence's result of a step: a token, or the error that ended the sequence."""

    sequence: int
    draw: TokenDraw | None
    """None only when there is an `error`."""
    finish_reason: str | None
    """``"stop"``, ``"length"``, or None while more tokens follow. A finished or failed sequence has left the batch."""
    error: Exception | None = None


class DecodeSequence:
    """The state of one sequence. Token t's KV is row ``row(t)`` of every layer's buffer."""

    def __init__(
        self,
        prompt_tokens: int,
        first_token: int,
        sampling: SamplingParams,
        generated_tokens: int,
        extents: tuple[Extent, ...],
        block_tokens: int,
        constraints: TokenConstraints | None,
    ) -> None:
        self.prompt_tokens, self.last_token, self.sampling = prompt_tokens, first_token, sampling
        self.generated_tokens = generated_tokens
        self.extents, self.constraints = extents, constraints
        self.kv_tokens = prompt_tokens
        self.joined = False
        self.copies = 0
        self.finished = finish_reason(sampling, first_token, generated_tokens)
        self._runs = [(e.first_block * block_tokens, e.blocks * block_tokens) for e in extents]

    def row(self, token: int) -> int:
        for first_row, rows in self._runs:
            if token < rows:
                return first_row + token
            token -= rows
        raise IndexError(f"token {token} past the end of the sequence's blocks")

    def packed(self, query: int) -> PackedSequence:
        """Returns this step's part of the pack: one new token at index `query`, which attends to all KV and its own."""
        left = self.kv_tokens + 1
        extents: list[tuple[int, int]] = []
        for first_row, rows in self._runs:
            if left > 0:
                extents.append((first_row, min(rows, left)))
            left -= rows
        return PackedSequence(first_query=query, new_tokens=1, past_tokens=self.kv_tokens, extents=tuple(extents))

    def advance(self, index: int, token: TokenDraw | Exception) -> StepOutput:
        """Take what was drawn in a step. `index` is the sequence's id. Returns its output."""
        if isinstance(token, Exception):
            self.finished = "error"
            return StepOutput(index, None, None, token)
        self.kv_tokens += 1
        self.generated_tokens += 1
        self.last_token = token.token_id
        self.finished = finish_reason(self.sampling, token.token_id, self.generated_tokens)
        if self.constraints is not None and self.finished is None:
            try:
                self.constraints.accept(token.token_id)
            except GrammarError as error:
                self.finished = "error"
                return StepOutput(index, None, None, error)
        return StepOutput(index, token, self.finished)
