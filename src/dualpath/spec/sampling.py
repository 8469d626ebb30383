"""Generation settings of a request: one record, shared by the API, the engines and a retried attempt."""

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Generation settings of one request, validated by the server before they reach an engine.

    Token *i* of a request is drawn with a generator seeded by ``(seed, i)``, so a retried attempt on any engine draws
    the tokens that the lost one would have drawn.
    """

    max_tokens: int
    """Most tokens to generate (≥ 1)."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are masked until this many tokens exist."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    seed: int = 0
    """Always set: the server draws one if the client gave none."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end generation; the model's end-of-sequence tokens are added by the server unless `ignore_eos`."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities. n: those of the chosen token and of the n most likely ones."""
    grammar: str = ""
    """An llguidance grammar (Lark, or its JSON form) that the generated text must match; empty: any text."""


def finish_reason(sampling: SamplingParams, last_token_id: int, generated_tokens: int) -> str | None:
    """Returns ``"stop"`` after a stop token, ``"length"`` at `max_tokens`, else None; the last token is counted."""
    if last_token_id in sampling.stop_token_ids and generated_tokens > sampling.min_tokens:
        return "stop"
    return "length" if generated_tokens >= sampling.max_tokens else None
