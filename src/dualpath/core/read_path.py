"""Path choice: which side's storage NIC reads a request's hit KV (paper §6.1), as legs of whole Full Blocks.

The paper's rule is the shorter of the two nodes' read queues. `pe_only` is what other disaggregated systems do,
`de_only` its mirror image, to measure one path by itself; `alternate` is two paths without a scheduler (an ablation
step); `split` is ours, named in the paper as future work: both sides read a part of one request, sized so that both
queues run dry together.
"""

from dualpath.core.policy import ReadPath
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side

MIN_SPLIT_BLOCKS = 4
"""`split` gives no side fewer blocks than this: a tiny leg costs a request and saves nothing."""

_GOLDEN_RATIO_64 = 0x9E37_79B9_7F4A_7C15
"""The golden ratio's fraction, times 2^64."""


def choose_legs(
    read_path: ReadPath,
    *,
    hit_blocks: int,
    pe_queue_tokens: int,
    de_queue_tokens: int,
    pe_buffer_blocks: int,
    turn: int,
) -> tuple[Leg, ...]:
    """Legs that tile blocks ``[0, hit_blocks)`` in order, PE side first; none where nothing hit.

    The queues are those of the two engines' *nodes*, this request not yet in them. A PE leg never exceeds
    `pe_buffer_blocks`, the PE buffer's capacity, except under `pe_only`, whose PE was chosen to be large enough.
    `turn` counts the requests with a hit so far and is read by `alternate` alone.
    """
    match read_path:
        case "pe_only":
            pe_blocks = hit_blocks
        case "de_only":
            pe_blocks = 0
        case "shorter_queue":
            pe_blocks = hit_blocks if pe_queue_tokens <= de_queue_tokens else 0
        case "alternate":
            pe_blocks = hit_blocks if _is_pe_turn(turn) else 0
        case _:
            assert read_path == "split", f"{read_path!r} is no read path"
            pe_blocks = _even_split(hit_blocks, pe_queue_tokens, de_queue_tokens, pe_buffer_blocks)
    if read_path != "pe_only" and pe_blocks > pe_buffer_blocks:
        pe_blocks = 0
    if not hit_blocks:
        return ()
    if pe_blocks == 0:
        return (Leg(Side.DE, 0, hit_blocks),)
    if pe_blocks == hit_blocks:
        return (Leg(Side.PE, 0, hit_blocks),)
    return (Leg(Side.PE, 0, pe_blocks), Leg(Side.DE, pe_blocks, hit_blocks - pe_blocks))


def least_pe_blocks(read_path: ReadPath, hit_blocks: int) -> int:
    """What a request needs of its PE's buffer however long the queues are: all it hit, where only PEs read."""
    return hit_blocks if read_path == "pe_only" else 0


def _is_pe_turn(turn: int) -> bool:
    """One of each side in every two turns, which one first by a golden-ratio sequence.

    Plain alternation would fall in step with a round robin over engines, and give some nodes all the reads and others
    none; an irrational rotation is in step with nothing.
    """
    pair, second = divmod(turn, 2)
    return (pair * _GOLDEN_RATIO_64 >> 63) % 2 == second


def _even_split(hit_blocks: int, pe_queue_tokens: int, de_queue_tokens: int, pe_buffer_blocks: int) -> int:
    """Blocks for the PE side so that ``pe_queue + pe_part = de_queue + de_part``, as nearly as legs allow."""
    lead_blocks = (de_queue_tokens - pe_queue_tokens) / BLOCK_TOKENS
    pe_blocks = min(hit_blocks, pe_buffer_blocks, max(0, round((hit_blocks + lead_blocks) / 2)))
    if pe_blocks < MIN_SPLIT_BLOCKS or hit_blocks - pe_blocks < MIN_SPLIT_BLOCKS:
        return hit_blocks if 2 * pe_blocks >= hit_blocks and hit_blocks <= pe_buffer_blocks else 0
    return pe_blocks
