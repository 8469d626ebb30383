"""What one prefill chunk moves, per layer: which token ranges come from which buffer, and which are shipped PE → DE.

Theory of operation (paper §4.1). Before a layer's attention, positions ``[0, past_tokens)`` must be on the PE device.
The hit tokens are in the buffer of the side that read them. Tokens that earlier chunks of the prompt computed are in
the DE buffer, where every computed token goes. After the layer, the chunk's new tokens are shipped to the DE buffer.
The first chunk also ships the hit tokens that the PE side read, because the DE buffer must finally hold the whole
prompt. On the DE path only miss tokens are shipped. A layer with a window loads and ships of the hit tokens only those
that the window still sees (`ChunkPlan.within`).

```
 prompt   |<------- hit ------->|<-- computed earlier -->|<-- new -->|
 load     PE or DE, by leg       DE buffer                 -
 ship     PE legs, first chunk   -                         always
```
"""

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side
from dualpath.spec.kv_bytes import first_seen


class Segment(msgspec.Struct, frozen=True, gc=False):
    """Tokens ``[first_token, first_token + tokens)`` in the buffer of `side`."""

    side: Side
    first_token: int
    tokens: int


class TokenRange(msgspec.Struct, frozen=True, gc=False):
    """Tokens ``[first_token, first_token + tokens)``."""

    first_token: int
    tokens: int


class ChunkPlan(msgspec.Struct, frozen=True):
    """Per layer: `loads` tile ``[0, past_tokens)`` in order; `ships` is what the DE buffer still lacks, in order."""

    past_tokens: int
    loads: tuple[Segment, ...]
    ships: tuple[TokenRange, ...]

    def within(self, window_tokens: int | None) -> "ChunkPlan":
        """Returns the plan for a layer in which a token sees `window_tokens` tokens, itself included; None: all.

        Of the tokens before the chunk, its first token sees the last ``window_tokens - 1``; what is computed later sees
        no earlier ones. The chunk's own tokens are all shipped: they become Full Blocks in storage.
        """
        first = first_seen(self.past_tokens, window_tokens)
        loads = (Segment(load.side, *cut) for load in self.loads if (cut := _from(first, load)))
        ships = (TokenRange(*cut) for ship in self.ships if (cut := _from(first, ship)))
        return ChunkPlan(self.past_tokens, tuple(loads), tuple(ships))


def chunk_plan(legs: tuple[Leg, ...], hit_tokens: int, past_tokens: int, new_tokens: int) -> ChunkPlan:
    """Returns the plan for the chunk that computes tokens ``[past_tokens, past_tokens + new_tokens)``.

    `legs` must tile the hit blocks, in any order. Raises ValueError when they don't, when the chunk is empty or when it
    starts inside the hit tokens.
    """
    if new_tokens < 1 or past_tokens < hit_tokens:
        raise ValueError(
            f"chunk of {new_tokens} new tokens after {past_tokens} cached, with {hit_tokens} hit: a chunk has at "
            "least one new token and starts after the hit tokens"
        )
    loads = _hit_segments(legs, hit_tokens)
    ships = [TokenRange(part.first_token, part.tokens) for part in loads if part.side is Side.PE]
    if past_tokens > hit_tokens:
        ships = []
        _append_segment(loads, Segment(Side.DE, hit_tokens, past_tokens - hit_tokens))
    if ships and ships[-1].first_token + ships[-1].tokens == past_tokens:
        ships[-1] = TokenRange(ships[-1].first_token, ships[-1].tokens + new_tokens)
    else:
        ships.append(TokenRange(past_tokens, new_tokens))
    return ChunkPlan(past_tokens, tuple(loads), tuple(ships))


def _from(first_token: int, part: Segment | TokenRange) -> tuple[int, int] | None:
    """Returns first token and number of the part's tokens from `first_token` on; None if there are none."""
    start, end = max(part.first_token, first_token), part.first_token + part.tokens
    return (start, end - start) if start < end else None


def _hit_segments(legs: tuple[Leg, ...], hit_tokens: int) -> list[Segment]:
    segments: list[Segment] = []
    next_block = 0
    for leg in sorted(legs, key=lambda leg: leg.first_block):
        if leg.first_block != next_block or leg.blocks < 1:
            break
        next_block += leg.blocks
        _append_segment(segments, Segment(leg.side, leg.first_block * BLOCK_TOKENS, leg.blocks * BLOCK_TOKENS))
    else:
        if next_block * BLOCK_TOKENS == hit_tokens:
            return segments
    raise ValueError(f"legs {legs} do not tile the {hit_tokens} hit tokens in blocks of {BLOCK_TOKENS}")


def _append_segment(segments: list[Segment], segment: Segment) -> None:
    """Append the segment, or extend the last one of the same side. Callers append in order, without gaps."""
    if segments and segments[-1].side is segment.side:
        last = segments.pop()
        segment = Segment(last.side, last.first_token, last.tokens + segment.tokens)
    segments.append(segment)
