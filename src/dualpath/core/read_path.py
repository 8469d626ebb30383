"""Path choice: which side's storage NIC reads a request's hit KV (paper §6.1), as legs of whole Full Blocks.

The paper's rule is the shorter of the two nodes' read queues. `pe_only` is what other disaggregated systems do,
`de_only` its mirror image, to measure one path by itself; `alternate` is two paths without a scheduler (an ablation
step); `split` is ours, named in the paper as future work: both sides read a part of one request, sized so that both
queues run dry together.

A rule is a function. To add one, write it, wrap it in `ReadPath` and name it in `READ_PATHS` and in a system.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side
from dualpath.spec.registry import Registry

MIN_SPLIT_BLOCKS = 4
"""`split` gives no side fewer blocks than this: a tiny leg costs a request and saves nothing."""

_GOLDEN_RATIO_64 = 0x9E37_79B9_7F4A_7C15
"""The golden ratio's fraction, times 2^64."""

Readers = Literal["PE", "DE", "both"]


class PathFacts(msgspec.Struct, frozen=True, gc=False):
    """What a rule knows of a request whose engines are chosen."""

    hit_blocks: int
    """From 1."""
    pe_queue_tokens: int
    """Read queue of the PE's *node*, this request not yet in it."""
    de_queue_tokens: int
    pe_buffer_blocks: int
    """Capacity of the PE buffer."""
    turn: int
    """Requests with a hit so far."""


ReadRule = Callable[[PathFacts], int]
"""How many of the hit blocks the PE's side reads, 0 to all; the DE's side reads the rest. Deterministic, no state."""


class ReadPath(msgspec.Struct, frozen=True):
    """A rule, and whose storage NICs it may use."""

    pe_blocks: ReadRule
    readers: Readers = "both"


def choose_legs(read_path: ReadPath, facts: PathFacts) -> tuple[Leg, ...]:
    """Legs that tile the hit blocks in order, PE side first.

    A PE leg never exceeds the PE buffer's capacity, except where only PEs read: `least_pe_blocks` had the PE chosen to
    be large enough. Raises ValueError for a rule that gives less than none or more than all.
    """
    hit_blocks = facts.hit_blocks
    pe_blocks = read_path.pe_blocks(facts)
    if not 0 <= pe_blocks <= hit_blocks:
        raise ValueError(f"read path {read_path.pe_blocks} gives the PE {pe_blocks} of {hit_blocks} hit blocks")
    if pe_blocks > facts.pe_buffer_blocks and read_path.readers != "PE":
        pe_blocks = 0
    if pe_blocks == 0:
        return (Leg(Side.DE, 0, hit_blocks),)
    if pe_blocks == hit_blocks:
        return (Leg(Side.PE, 0, hit_blocks),)
    return (Leg(Side.PE, 0, pe_blocks), Leg(Side.DE, pe_blocks, hit_blocks - pe_blocks))


def least_pe_blocks(read_path: ReadPath, hit_blocks: int) -> int:
    """What a request needs of its PE's buffer however long the queues are: all it hit, where only PEs read."""
    return hit_blocks if read_path.readers == "PE" else 0


def _pe_only(facts: PathFacts) -> int:
    return facts.hit_blocks


def _de_only(_facts: PathFacts) -> int:
    return 0


def _shorter_queue(facts: PathFacts) -> int:
    """The paper's (§6.1). A tie goes to the PE, whose path moves the KV once less."""
    return facts.hit_blocks if facts.pe_queue_tokens <= facts.de_queue_tokens else 0


def _alternate(facts: PathFacts) -> int:
    return facts.hit_blocks if _is_pe_turn(facts.turn) else 0


def _is_pe_turn(turn: int) -> bool:
    """One of each side in every two turns, which one first by a golden-ratio sequence.

    Plain alternation would fall in step with a round robin over engines, and give some nodes all the reads and others
    none; an irrational rotation is in step with nothing.
    """
    pair, second = divmod(turn, 2)
    return (pair * _GOLDEN_RATIO_64 >> 63) % 2 == second


def _split(facts: PathFacts) -> int:
    """So many that ``pe_queue + pe_part = de_queue + de_part``, as nearly as legs allow."""
    hit_blocks, buffer_blocks = facts.hit_blocks, facts.pe_buffer_blocks
    lead_blocks = (facts.de_queue_tokens - facts.pe_queue_tokens) / BLOCK_TOKENS
    pe_blocks = min(hit_blocks, buffer_blocks, max(0, round((hit_blocks + lead_blocks) / 2)))
    if pe_blocks < MIN_SPLIT_BLOCKS or hit_blocks - pe_blocks < MIN_SPLIT_BLOCKS:
        return hit_blocks if 2 * pe_blocks >= hit_blocks and hit_blocks <= buffer_blocks else 0
    return pe_blocks


READ_PATHS: Registry[ReadPath] = Registry(
    "read path",
    None,
    known={
        "pe_only": ReadPath(_pe_only, "PE"),
        "de_only": ReadPath(_de_only, "DE"),
        "shorter_queue": ReadPath(_shorter_queue),
        "alternate": ReadPath(_alternate),
        "split": ReadPath(_split),
    },
)


def find_read_path(name: str) -> ReadPath:
    """Raises UnknownNameError. A bare function, such as ``module:function`` names, may use both sides."""
    found = READ_PATHS.get(name)
    return found if isinstance(found, ReadPath) else ReadPath(found)
