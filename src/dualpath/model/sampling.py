"""Draws tokens from logits, such that a retried attempt draws the same tokens as the lost one.

Token *i* of a request is drawn with a counter-based generator keyed by ``(seed, i)``. No state survives a step, so the
draw does not depend on the engine or on its earlier draws. One uniform number picks from the cumulative distribution in
token order, so rounding differences between engines almost never change the choice.
"""

import msgspec
import numpy as np
import torch

from dualpath.spec.sampling import SamplingParams


class TokenDraw(msgspec.Struct, frozen=True, gc=False):
    """One drawn token. Log-probabilities are the model's own: no temperature, no mask, no truncation."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm; None unless requested."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely ``(token_id, logprob)``, best first, as many as requested."""

    @property
    def logprobs(self) -> list[tuple[int, float]] | None:
        """Returns the chosen token's logprob, then those of the most likely ones; None unless requested."""
        return None if self.logprob is None else [(self.token_id, self.logprob), *self.top]


def draw(
    logits: torch.Tensor, params: list[SamplingParams], generated_tokens: list[int]
) -> list[TokenDraw | Exception]:
    """Draw one token for each row of `logits` ``[n, vocab]``; row i is token number ``generated_tokens[i]`` (from 0).

    A row with logits that are not numbers gets a FloatingPointError in its place; the other rows are unaffected.
    """
    if not logits.shape[0] == len(params) == len(generated_tokens):
        raise ValueError(f"{logits.shape[0]} rows of logits, {len(params)} params, {len(generated_tokens)} positions")
    rows = logits.detach().to(device="cpu", dtype=torch.float32)
    return [_draw_row(row, param, index) for row, param, index in zip(rows, params, generated_tokens, strict=True)]


def _draw_row(logits: torch.Tensor, params: SamplingParams, index: int) -> TokenDraw | Exception:
    if torch.isnan(logits).any():
        return FloatingPointError("the model's logits are not numbers; its KV or its weights are damaged")
    masked = logits
    if index < params.min_tokens and params.stop_token_ids:
        masked = logits.clone()
        masked[list(params.stop_token_ids)] = -torch.inf
    token_id = int(masked.argmax()) if params.temperature == 0 else _sample(masked, params, index)
    if params.logprobs is None:
        return TokenDraw(token_id)
    logprobs = logits.log_softmax(-1)
    top = logprobs.topk(min(params.logprobs, logprobs.shape[0]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenDraw(token_id, float(logprobs[token_id]), tuple(pairs))


def _sample(logits: torch.Tensor, params: SamplingParams, index: int) -> int:
    """Temperature, then top-k, then top-p; ties are cut in favour of the lower id."""
    scaled = logits.double() / params.temperature
    probabilities = scaled.softmax(-1)
    vocabulary = probabilities.shape[0]
    top_k = params.top_k if 0 < params.top_k < vocabulary else vocabulary
    if top_k < vocabulary or params.top_p < 1.0:
        order = scaled.sort(descending=True, stable=True).indices[:top_k]
        ordered = probabilities[order]
        before = ordered.cumsum(0) - ordered
        dropped = before >= params.top_p * ordered.sum()
        dropped[0] = False
        kept = torch.zeros_like(probabilities)
        kept[order] = ordered.masked_fill(dropped, 0.0)
        probabilities = kept
    cumulative = probabilities.cumsum(0)
    threshold = _uniform(params.seed, index) * cumulative[-1]
    chosen = int(torch.searchsorted(cumulative, threshold, right=True))
    return chosen if chosen < vocabulary else int(probabilities.nonzero()[-1])


def _uniform(seed: int, index: int) -> float:
    """Returns a number in [0, 1) that depends only on the arguments."""
    bits = np.random.Philox(key=seed % 2**128, counter=index)
    return float(np.random.Generator(bits).random())
