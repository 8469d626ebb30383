"""What bends one sequence's distribution before a draw: grammar, allowed tokens, bad words, biases, penalties.

They are applied in vLLM's order. Transformers' processors do what they have; frequency and presence penalties, which
they lack, are counted here. A sequence without any of these has no `TokenConstraints`, and its draw costs nothing more.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from dualpath.model.grammar import Matcher
from dualpath.spec.sampling import SamplingParams, TokenHistory

Processor = Callable[[Tensor, Tensor], Tensor]


class TokenConstraints:
    """The constraints of one sequence, and the tokens that they have seen."""

    def __init__(self, params: SamplingParams, history: TokenHistory | None, matcher: Matcher | None) -> None:
        """`matcher` is at the start of the grammar; None where there is none. Raises GrammarError when the history
        does not follow the grammar."""
        self._params = params
        self._matcher = matcher
        self._prompt = torch.tensor([history.prompt if history else []], dtype=torch.int64)
        self._generated: list[int] = []
        self._counts: Tensor | None = None
        self._bad_words: Processor | None = None
        self._bias: Processor | None = None
        self._repetition: Processor | None = None
        if params.bad_words:
            self._bad_words = NoBadWordsLogitsProcessor([list(word) for word in params.bad_words])
        if params.logit_bias:
            self._bias = SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in params.logit_bias])
        if params.repetition_penalty != 1.0:
            self._repetition = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        for token in history.generated if history else []:
            self.accept(token)

    def accept(self, token_id: int) -> None:
        """Note a token that was drawn. Raises GrammarError when the grammar does not allow it."""
        self._generated.append(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1
        if self._matcher is not None:
            self._matcher.advance([token_id])

    def apply(self, logits: Tensor, index: int) -> Tensor:
        """Returns the constrained copy of a row of float32 logits ``[vocab]``, for token number `index` (from 0).

        Raises GrammarError.
        """
        params = self._params
        early_stops = params.stop_token_ids if index < params.min_tokens else ()
        row = logits.clone()[None]
        if self._matcher is not None:
            row.masked_fill_(~self._matcher.allowed(row.shape[1], early_stops, not params.ignore_eos), -torch.inf)
        if params.allowed_token_ids:
            row = torch.full_like(row, -torch.inf).index_copy_(
                1, kept := torch.tensor(params.allowed_token_ids), row[:, kept]
            )
        if self._bad_words is not None:
            row = self._bad_words(torch.tensor([self._generated], dtype=torch.int64), row)
        if early_stops and self._matcher is None:
            row[:, list(early_stops)] = -torch.inf
        if self._bias is not None:
            row = self._bias(self._prompt, row)
        return self._penalised(row)[0]

    def _penalised(self, row: Tensor) -> Tensor:
        params = self._params
        if not (self._repetition or params.frequency_penalty or params.presence_penalty):
            return row
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self._generated, dtype=torch.int64), minlength=row.shape[1])
        seen = self._counts > 0
        if self._repetition is not None:
            row = self._repetition(torch.cat([self._prompt, seen.nonzero().T], dim=1), row)
        if params.frequency_penalty:
            row = row - params.frequency_penalty * self._counts
        if params.presence_penalty:
            row = row - params.presence_penalty * seen
        return row
