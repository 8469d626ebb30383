"""The bytes of single tokens, by the kind of the vocabulary.

Decoding one token alone gives U+FFFD for a part of a character, and drops a SentencePiece token's leading space. The
vocabulary's own entries say more: byte-level ones are written in an alphabet of 256 letters, one a byte; those with
byte fallback write a byte as ``<0xE2>`` and a space as ``▁``.
"""

import re
from collections.abc import Callable
from typing import Any

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "▁"


class TokenBytes:
    """Called with a token id, returns that token's bytes; those of its decoded text where its kind is not known."""

    def __init__(self, tokenizer: Any, decode: Callable[[list[int]], str]) -> None:
        self._tokenizer = tokenizer
        self._decode = decode
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None else repr(backend.decoder)
        self._letters: dict[str, int] = {}
        if "ByteLevel" in decoder:
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self._sentence_piece = _SPACE in decoder
        self._added = {} if backend is None else {i: t.content for i, t in backend.get_added_tokens_decoder().items()}

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id) if self._letters or self._sentence_piece else None
        if piece and self._letters and all(letter in self._letters for letter in piece):
            return bytes(self._letters[letter] for letter in piece)
        if piece and self._sentence_piece:
            byte = _BYTE.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else str(piece).replace(_SPACE, " ").encode()
        return self._decode([token_id]).encode()
