"""Generation settings of a request: one record, shared by the API, the engines and a retried attempt."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from dualpath.spec.bounds import MAX_ITEMS, Count, TokenId

Tokens = Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ITEMS)]
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
"""Which distribution log-probabilities are of, in vLLM's words: the model's own, or the one that the token was drawn
from, after masks, biases, penalties, temperature, min_p, top_k and top_p.
"""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Generation settings of one request, validated by the server before they reach an engine.

    Token *i* of a request is drawn with a generator seeded by ``(seed, i)``, so a retried attempt on any engine draws
    the tokens that the lost one would have drawn.
    """

    max_tokens: Count
    """Most tokens to generate (≥ 1)."""
    min_tokens: Count = 0
    """End-of-sequence and stop tokens are masked until this many tokens exist."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: Count = 0
    """0 means no limit."""
    min_p: float = 0.0
    """Tokens with less than this share of the likeliest token's probability are not drawn."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit once it was generated."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens of the prompt and of the answer, multiplies the negative ones."""
    logit_bias: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=MAX_ITEMS)] = ()
    """``(token_id, bias)``, added to the logits."""
    bad_words: Annotated[tuple[Tokens, ...], Meta(max_length=MAX_ITEMS)] = ()
    """Token sequences that the answer must not contain."""
    allowed_token_ids: Tokens = ()
    """The only tokens that may be drawn; empty: all."""
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """Always set: the server draws one if the client gave none."""
    stop_token_ids: Tokens = ()
    """Tokens that end generation. The server adds the model's end-of-sequence tokens, unless `ignore_eos` is set and
    there is no grammar."""
    ignore_eos: bool = False
    logprobs: Count | None = None
    """None: no log-probabilities. n: those of the chosen token and of the n most likely ones."""
    logprobs_mode: LogprobsMode = "raw_logprobs"
    prompt_logprobs: Count | None = None
    """None: none. n: for each prompt token, its raw log-probability and rank, and the n most likely tokens."""
    grammar: Annotated[str, Meta(max_length=1 << 26)] = ""
    """An llguidance grammar (Lark, or its JSON form) that the generated text must match; empty: any text. Once it is
    complete the sequence ends, also under `ignore_eos` or before `min_tokens`."""

    @property
    def counts_generated(self) -> bool:
        """Whether a draw depends on the tokens generated before it."""
        return bool(
            self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
            or self.bad_words
            or self.grammar
        )

    @property
    def is_constrained(self) -> bool:
        """Whether more than temperature, top_k, top_p, min_p and min_tokens shapes a draw."""
        return bool(self.counts_generated or self.logit_bias or self.allowed_token_ids)


class TokenHistory(msgspec.Struct, frozen=True):
    """What was there before a draw, as far as the request's settings ask for it."""

    prompt: Annotated[list[TokenId], Meta(max_length=MAX_ITEMS)] = []
    """The distinct tokens of the client's prompt, for a repetition penalty."""
    generated: Annotated[list[TokenId], Meta(max_length=MAX_ITEMS)] = []
    """The tokens generated so far, in order."""


def token_history(sampling: SamplingParams, prompt: list[int], generated: list[int]) -> TokenHistory | None:
    """Returns what draws of this request need to know; None when they need nothing."""
    if not sampling.counts_generated:
        return None
    return TokenHistory(sorted(set(prompt)) if sampling.repetition_penalty != 1.0 else [], generated)


def finish_reason(sampling: SamplingParams, last_token_id: int, generated_tokens: int) -> str | None:
    """Returns ``"stop"`` after a stop token, ``"length"`` at `max_tokens`, else None; the last token is counted.

    Before `min_tokens`, a stop token is drawn only where a grammar allows nothing else; then it ends the sequence.
    """
    if last_token_id in sampling.stop_token_ids and (generated_tokens > sampling.min_tokens or sampling.grammar):
        return "stop"
    return "length" if generated_tokens >= sampling.max_tokens else None
