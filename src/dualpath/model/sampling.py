"""Draws tokens from logits, such that a retried attempt draws the same tokens as the lost one.

Token *i* of a request is drawn with a counter-based generator keyed by ``(seed, i)``. No state of the generator
survives a step, so the draw does not depend on the engine or on its earlier draws. One uniform number picks from the
cumulative distribution in token order, so rounding differences between engines almost never change the choice. What a
draw must know of earlier tokens is in the sequence's `TokenConstraints`, which a retried attempt makes anew.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper

from dualpath.model.constraints import TokenConstraints
from dualpath.model.grammar import GrammarError
from dualpath.spec.sampling import SamplingParams


class NoTokenError(ValueError):
    """The request's settings leave no token that may be drawn."""


class TokenDraw(msgspec.Struct, frozen=True, gc=False):
    """One drawn token. `SamplingParams.logprobs_mode` says of which distribution its log-probabilities are."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm; None unless requested."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ``(token_id, logprob)``, best first, as many as requested and possible."""

    @property
    def logprobs(self) -> list[tuple[int, float]] | None:
        """Returns the chosen token's logprob, then those of the most likely ones; None unless requested."""
        return None if self.logprob is None else [(self.token_id, self.logprob), *self.top]


def draw(
    logits: Tensor,
    params: list[SamplingParams],
    generated_tokens: list[int],
    constraints: Sequence[TokenConstraints | None] | None = None,
) -> list[TokenDraw | Exception]:
    """Draw one token for each row of `logits` ``[n, vocab]``; row i is token number ``generated_tokens[i]`` (from 0).

    `constraints` has an entry for each row, None for a row without any. A row gets an exception in its place, and the
    other rows are unaffected, when its logits are not numbers (FloatingPointError), when its grammar fails
    (GrammarError) or when nothing may be drawn (NoTokenError).
    """
    if not logits.shape[0] == len(params) == len(generated_tokens):
        raise ValueError(f"{logits.shape[0]} rows of logits, {len(params)} params, {len(generated_tokens)} positions")
    rows = logits.detach().to(device="cpu", dtype=torch.float32)
    held = [None] * len(params) if constraints is None else constraints
    return [_draw_row(*row) for row in zip(rows, params, generated_tokens, held, strict=True)]


def _draw_row(
    logits: Tensor, params: SamplingParams, index: int, constraints: TokenConstraints | None
) -> TokenDraw | Exception:
    if torch.isnan(logits).any():
        return FloatingPointError("the model's logits are not numbers; its KV or its weights are damaged")
    masked = logits
    if constraints is not None:
        try:
            masked = constraints.apply(logits, index)
        except GrammarError as error:
            return error
        if masked.max() == -torch.inf:
            return NoTokenError("grammar, allowed_token_ids, bad_words and min_tokens together leave no token to draw")
    elif index < params.min_tokens and params.stop_token_ids:
        masked = logits.clone()
        masked[list(params.stop_token_ids)] = -torch.inf
    probabilities = None if params.temperature == 0 else _probabilities(masked, params)
    token_id = int(masked.argmax()) if probabilities is None else _pick(probabilities, params.seed, index)
    if params.logprobs is None:
        return TokenDraw(token_id)
    if params.logprobs_mode == "raw_logprobs":
        logprobs = logits.log_softmax(-1)
    else:
        logprobs = masked.log_softmax(-1) if probabilities is None else (probabilities / probabilities.sum()).log()
    top = logprobs.topk(min(params.logprobs, logprobs.shape[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenDraw(token_id, float(logprobs[token_id]), tuple(pair for pair in pairs if pair[1] > -torch.inf))


def _probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then min-p, then top-k, then top-p; ties are cut in favour of the lower id. The sum is 1 or less."""
    scaled = logits.double() / params.temperature
    if params.min_p:
        scaled = MinPLogitsWarper(params.min_p)(None, scaled[None])[0]
    probabilities = scaled.softmax(-1)
    vocabulary = probabilities.shape[0]
    top_k = params.top_k if 0 < params.top_k < vocabulary else vocabulary
    if top_k < vocabulary or params.top_p < 1.0:
        order = _best(scaled, top_k)
        ordered = probabilities[order]
        before = ordered.cumsum(0) - ordered
        dropped = before >= params.top_p * ordered.sum()
        dropped[0] = False
        kept = torch.zeros_like(probabilities)
        kept[order] = ordered.masked_fill(dropped, 0.0)
        probabilities = kept
    return probabilities


def _best(scaled: Tensor, count: int) -> Tensor:
    """Returns the `count` best tokens, best first, of equals the lower ids. Sorts no more than it must."""
    if count == scaled.shape[0]:
        return scaled.sort(descending=True, stable=True).indices
    candidates = (scaled >= scaled.topk(count).values[-1]).nonzero()[:, 0]
    return candidates[scaled[candidates].sort(descending=True, stable=True).indices[:count]]


def _pick(probabilities: Tensor, seed: int, index: int) -> int:
    cumulative = probabilities.cumsum(0)
    threshold = _uniform(seed, index) * cumulative[-1]
    chosen = int(torch.searchsorted(cumulative, threshold, right=True))
    return chosen if chosen < probabilities.shape[0] else int(probabilities.nonzero()[-1])


def _uniform(seed: int, index: int) -> float:
    """Returns a number in [0, 1) that depends only on the arguments."""
    bits = np.random.Philox(key=seed % 2**128, counter=index)
    return float(np.random.Generator(bits).random())
