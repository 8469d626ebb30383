"""Path choice: which side's storage NIC reads a request's hit KV (paper §6.1), as legs of whole Full Blocks.

The paper's rule, `shorter_queue`, takes the node with the shorter read queue. `pe_only` is what other disaggregated
systems do; `de_only` is its mirror image, to measure one path alone; `alternate` uses both paths without a scheduler
(an ablation step). `split` is ours, and the paper's future work: both sides read a part of one request, sized so that
both queues empty at the same time.

A rule is a function. To add one, write it, wrap it in `ReadPath` and name it in `READ_PATHS` and in a system.
"""

from collections.abc import Callable
from typing import Literal

import msgspec

from dualpath.core.policy import PolicyError
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side
from dualpath.spec.registry import Registry, UnknownNameError

MIN_SPLIT_BLOCKS = 4
"""`split` makes no leg shorter than this: a tiny leg costs a read request and saves nothing."""

_GOLDEN_RATIO_64 = 0x9E37_79B9_7F4A_7C15
"""The golden ratio's fraction, times 2^64."""

Readers = Literal["PE", "DE", "both"]


class PathFacts(msgspec.Struct, frozen=True, gc=False):
    """What a rule knows of a request whose engines are chosen."""

    hit_blocks: int
    """At least 1."""
    pe_queue_tokens: int
    """Read queue of the PE's *node*, without this request."""
    de_queue_tokens: int
    pe_buffer_blocks: int
    """Capacity of the PE buffer."""
    turn: int
    """Number of requests with a hit so far."""


ReadRule = Callable[[PathFacts], int]
"""Returns how many hit blocks the PE side reads, 0 to all; the DE side reads the rest. Deterministic, stateless."""


class ReadPath(msgspec.Struct, frozen=True):
    """A rule, and whose storage NICs it may use."""

    pe_blocks: ReadRule
    readers: Readers = "both"


def choose_legs(read_path: ReadPath, facts: PathFacts) -> tuple[Leg, ...]:
    """Returns legs that tile the hit blocks in order, PE side first.

    A PE leg never exceeds the PE buffer's capacity: when the rule gives it more, the DE reads all. Where only PEs read,
    `least_pe_blocks` has made sure that the PE is large enough. Raises ValueError for a part below 0 or above all.
    """
    hit_blocks = facts.hit_blocks
    pe_blocks = read_path.pe_blocks(facts)
    if not (isinstance(pe_blocks, int) and 0 <= pe_blocks <= hit_blocks):
        name = f"{read_path.pe_blocks.__module__}:{read_path.pe_blocks.__qualname__}"
        raise PolicyError(f"read path {name} gives the PE {pe_blocks!r} of {hit_blocks} hit blocks; give 0 to all")
    if pe_blocks > facts.pe_buffer_blocks and read_path.readers != "PE":
        pe_blocks = 0
    if pe_blocks == 0:
        return (Leg(Side.DE, 0, hit_blocks),)
    if pe_blocks == hit_blocks:
        return (Leg(Side.PE, 0, hit_blocks),)
    return (Leg(Side.PE, 0, pe_blocks), Leg(Side.DE, pe_blocks, hit_blocks - pe_blocks))


def least_pe_blocks(read_path: ReadPath, hit_blocks: int) -> int:
    """Returns the PE buffer blocks that a request needs in any case: all its hit blocks where only PEs read, else 0."""
    return hit_blocks if read_path.readers == "PE" else 0


def _pe_only(facts: PathFacts) -> int:
    return facts.hit_blocks


def _de_only(_facts: PathFacts) -> int:
    return 0


def _shorter_queue(facts: PathFacts) -> int:
    """The paper's rule (§6.1). A tie goes to the PE, whose path moves the KV once less."""
    return facts.hit_blocks if facts.pe_queue_tokens <= facts.de_queue_tokens else 0


def _alternate(facts: PathFacts) -> int:
    return facts.hit_blocks if _is_pe_turn(facts.turn) else 0


def _is_pe_turn(turn: int) -> bool:
    """Each side gets one of every two turns; a golden-ratio sequence says which side is first.

    Plain alternation would synchronise with a round robin over engines and give some nodes all the reads and others
    none; an irrational rotation synchronises with nothing.
    """
    pair, second = divmod(turn, 2)
    return (pair * _GOLDEN_RATIO_64 >> 63) % 2 == second


def _split(facts: PathFacts) -> int:
    """Returns the part for which ``pe_queue + pe_part = de_queue + de_part``, as nearly as legs allow."""
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
    """Raises UnknownNameError when no rule has the name. A bare function (``module:function``) may use both sides."""
    found = READ_PATHS.get(name)
    if not callable(found) and not isinstance(found, ReadPath):
        raise UnknownNameError(f"read path {name!r} is {found!r}, which is no function; name a rule or a ReadPath")
    return found if isinstance(found, ReadPath) else ReadPath(found)
