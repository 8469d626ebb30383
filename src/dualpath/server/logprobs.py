"""How answers show log-probabilities: OpenAI's two shapes, and vLLM's for prompts.

A token is named by its text. In completions names are keys, so they must differ: a part of a character is
``bytes:\\xe2\\x80``, as in OpenAI's, and of several tokens with one text only the first has it, the others are
``token_id:123``. With `return_tokens_as_token_ids` every name is ``token_id:123``, as in vLLM's.
"""

from collections.abc import Sequence
from typing import Any

from dualpath.cluster.generator import PromptLogprob, TokenLogprob
from dualpath.server.codec import TextCodec

PromptEntry = dict[str, dict[str, Any]]
"""By token id: ``logprob``, ``rank`` and ``decoded_token``."""
_LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


class LogprobShapes:
    """Shapes log-probabilities for one request. An entry is a position's tokens, the chosen one first."""

    def __init__(self, codec: TextCodec, tokens_as_ids: bool) -> None:
        self._codec = codec
        self._tokens_as_ids = tokens_as_ids

    def completion(
        self, entries: Sequence[Sequence[TokenLogprob]], offset: int, first_token_id: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """Returns parallel lists over tokens, and the next offset. `first_token_id`, before the entries,
        has no log-probability.

        `text_offset` counts characters of the tokens' own texts, from `offset` on.
        """
        unscored = [] if first_token_id is None else [first_token_id]
        token_ids = [*unscored, *(entry[0].token_id for entry in entries)]
        offsets = []
        for token_id in token_ids:
            offsets.append(offset)
            offset += len(self._codec.token_text(token_id))
        shaped = {
            "tokens": [self._name(token_id) for token_id in token_ids],
            "token_logprobs": [*(None for _ in unscored), *(number(entry[0]) for entry in entries)],
            "top_logprobs": [*(None for _ in unscored), *(self._by_name(entry) for entry in entries)],
            "text_offset": offsets,
        }
        return shaped, offset

    def chat(self, entries: Sequence[Sequence[TokenLogprob]]) -> dict[str, Any]:
        content = [{**self._token(chosen), "top_logprobs": [self._token(t) for t in top]} for chosen, *top in entries]
        return {"content": content, "refusal": None}

    def prompt(self, scores: Sequence[PromptLogprob]) -> list[PromptEntry | None]:
        """Returns an entry for each prompt token; None for the first, which has nothing before it."""
        entries: list[PromptEntry | None] = [None]
        for score in scores:
            own, *top = score.tokens
            ranked = {token.token_id: (token, rank) for rank, token in enumerate(top, 1)}
            ranked = {own.token_id: (own, score.rank)} | ranked
            entries.append({str(i): self._ranked(token, rank) for i, (token, rank) in ranked.items()})
        return entries

    def _name(self, token_id: int) -> str:
        if self._tokens_as_ids:
            return f"token_id:{token_id}"
        text, own_bytes = self._codec.token_text(token_id), self._codec.token_bytes(token_id)
        return text if text.encode() == own_bytes else "bytes:" + "".join(f"\\x{byte:02x}" for byte in own_bytes)

    def _by_name(self, entry: Sequence[TokenLogprob]) -> dict[str, float]:
        named: dict[str, float] = {}
        for token in {token.token_id: token for token in entry}.values():
            name = self._name(token.token_id)
            named[f"token_id:{token.token_id}" if name in named else name] = number(token)
        return named

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        text = f"token_id:{token.token_id}" if self._tokens_as_ids else self._codec.token_text(token.token_id)
        return {"token": text, "logprob": number(token), "bytes": list(self._codec.token_bytes(token.token_id))}

    def _ranked(self, token: TokenLogprob, rank: int) -> dict[str, Any]:
        return {"logprob": number(token), "rank": rank, "decoded_token": self._codec.token_text(token.token_id)}


def number(token: TokenLogprob) -> float:
    return max(token.logprob, _LEAST_LOGPROB)
