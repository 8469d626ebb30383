"""Keeps token ids as the text of a request's body, so that a long context is encoded once and not every turn.

Encoding a prompt of 60,000 ids takes milliseconds, and an agent sends nearly the same prompt again and again. `Prompt`
holds the inside of the JSON array, ``12,7,4051``, and grows at its end; sending it is a copy of bytes.
"""

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

_COMMA = ord(",")


class Prompt:
    """One agent's growing context. `tokens` is the number of ids it holds."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self.tokens = 0
        self._text = bytearray()
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        if token_ids:
            self._text += b"," if self.tokens else b""
            self._text += msgspec.json.encode(token_ids)[1:-1]
            self.tokens += len(token_ids)

    def keep(self, tokens: int) -> None:
        """Drops what comes after the first `tokens` ids (a compaction); does nothing if there are no more."""
        if tokens < self.tokens:
            # A copy is searched, because a view of the bytearray would keep it from shrinking.
            commas = np.flatnonzero(np.frombuffer(bytes(self._text), np.uint8) == _COMMA)
            del self._text[int(commas[tokens - 1]) if tokens else 0 :]
            self.tokens = tokens

    def token_ids(self) -> list[int]:
        return msgspec.json.decode(b"[%b]" % bytes(self._text), type=list[int])

    def body(self, fields: Iterable[tuple[str, object]]) -> bytes:
        """Returns a JSON object of `fields` and ``"prompt"``."""
        rest = msgspec.json.encode(dict(fields))
        return b"".join((b'{"prompt":[', self._text, b"],", rest[1:]))
