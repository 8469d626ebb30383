"""How many bytes a token's KV takes, and how many of them a hit reads, where layers may have windows.

A layer without a window sees every token before. One with a window of W sees a token itself and the W − 1 before it.
Of a hit of n tokens, what is computed next sees there the last W − 1, so the Full Blocks before those are not read for
that layer. Storage has them whole all the same: a prompt that ends earlier sees other tokens.
"""

from typing import Annotated

import msgspec

from dualpath.spec.bounds import Count

BLOCK_TOKENS = 64


def first_seen(tokens: int, window_tokens: int | None) -> int:
    """Returns the first of `tokens` cached tokens that a layer sees from the next token on; None: it has no window."""
    return 0 if window_tokens is None else max(0, tokens - window_tokens + 1)


class Window(msgspec.Struct, frozen=True):
    """The layers that see a window of `window_tokens` tokens."""

    window_tokens: Annotated[int, msgspec.Meta(ge=1)]
    bytes_per_token: Count


class KVBytes(msgspec.Struct, frozen=True):
    """Bytes of a token's KV over all layers of a model."""

    whole_bytes_per_token: Count
    """Of the layers without a window."""
    windows: Annotated[tuple[Window, ...], msgspec.Meta(max_length=16)] = ()

    @property
    def bytes_per_token(self) -> int:
        """What is stored, and what a computed token is shipped as."""
        return self.whole_bytes_per_token + sum(window.bytes_per_token for window in self.windows)

    def hit_bytes(self, hit_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
        """Returns the bytes that are read from storage for a hit, in whole blocks of each layer."""
        return self.seen_bytes(0, hit_tokens, hit_tokens, block_tokens)

    def seen_bytes(self, first_token: int, tokens: int, context_tokens: int, block_tokens: int = 1) -> int:
        """Returns the bytes of tokens ``first_token … + tokens`` that are seen from token `context_tokens` on.

        Layers see whole blocks of `block_tokens` tokens.
        """
        n_bytes = tokens * self.whole_bytes_per_token
        for window in self.windows:
            first = first_seen(context_tokens, window.window_tokens) // block_tokens * block_tokens
            n_bytes += max(0, first_token + tokens - max(first, first_token)) * window.bytes_per_token
        return n_bytes
