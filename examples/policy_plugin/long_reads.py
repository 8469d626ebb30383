"""Somebody else's policy: long reads go to the decode side, short ones to the shorter queue.

The DE path moves a hit's KV over the compute network once (DE to PE); the PE path also ships it to the DE afterwards.
So where the compute network is slow, long hits are better read by the DE.
"""

from dualpath import PathFacts, Policy, System

LONG_BLOCKS = 32
"""2,048 tokens."""


def pe_blocks(facts: PathFacts) -> int:
    """How many of the hit blocks the PE's side reads."""
    if facts.hit_blocks >= LONG_BLOCKS:
        return 0
    return facts.hit_blocks if facts.pe_queue_tokens <= facts.de_queue_tokens else 0


SYSTEM = System(
    name="long-reads-decode",
    summary="decode engines read long hits, the shorter queue short ones (examples/policy_plugin)",
    policy=Policy(read_path="long_reads:pe_blocks"),
    colour="#882255",
)
