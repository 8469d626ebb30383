"""Text and tokens: the model's tokenizer, used so that a long prompt does not hold up everybody's streams.

A fast tokenizer's backend is called directly. Its `encode` keeps the interpreter lock for the whole text, while
`encode_batch_fast` gives it up and skips the offsets nobody asked for (measured on 900 kB: 0.5 against 2.4 M characters
a second), so the latter is used for one text too, in a thread when the text is long.
"""

import asyncio
from typing import Any

from dualpath.server.errors import ApiError, bad_parameter

_INLINE_CHARACTERS = 2000
"""Shorter texts take less than about a millisecond; moving them to a thread would cost more than it spares."""


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path` (a directory, or a model's name). Imports Transformers only now, which loads torch."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


class TextCodec:
    """Encode, decode and render chats with one Transformers tokenizer, fast or slow."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._token_texts: dict[int, str] = {}
        if self._backend is not None:  # a prompt is never cut or filled up behind the client's back
            self._backend.no_truncation()
            self._backend.no_padding()

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= _INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        """Render `messages` with the model's chat template, then encode.

        Raises ApiError (400) when there is no template or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise bad_parameter(
                "messages", "this model's tokenizer has no chat template; use /v1/completions", code="no_chat_template"
            )
        if sum(len(str(message.get("content"))) for message in messages) <= _INLINE_CHARACTERS:
            return self._encode_chat(messages, options)
        return await asyncio.to_thread(self._encode_chat, messages, options)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token_id: int) -> str:
        """The token alone, as log-probabilities name it. Remembered: the vocabulary bounds the memory."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def _encode_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except ApiError:
            raise
        except Exception as error:  # templates are programs of the model's authors and raise what they like
            raise bad_parameter("messages", f"the model's chat template refuses these messages: {error}") from error
        return self._encode(text, add_special_tokens=False)
