"""What the scheduler's half of the connector tells the workers' halves with each step of vLLM.

A *device block* is one of vLLM's, of `block_size` tokens; a *block* is a Full Block of `BLOCK_TOKENS`, so one or more
device blocks in a row. vLLM pickles these for workers in other processes.
"""

from dataclasses import dataclass, field

from dualpath.cluster.attachment import Owner


@dataclass(slots=True)
class Chunk:
    """PE: what a step computes of a prompt."""

    owner: Owner
    first_block: int
    """The first block that it writes into."""
    device_blocks: list[int]
    """Of all blocks that it writes into; the last one may have too few."""
    computed_tokens: int
    """Of the prompt, after the step."""
    hit_device_blocks: list[int] = field(default_factory=list)
    """Of the hit blocks, when this step has to load them first."""


@dataclass(slots=True)
class Load:
    """DE: device blocks wait for a prompt's KV."""

    request_id: str
    owner: Owner
    local_tokens: int
    """Found in vLLM's own prefix cache; their device blocks may be shared and are not written."""
    device_blocks: list[int]
    """Of the whole prompt."""


@dataclass(slots=True)
class Progress:
    """DE: tokens that are known since the last one, and how many tokens' KV is complete."""

    owner: Owner
    computed_tokens: int
    token_ids: list[int]


@dataclass(slots=True)
class End:
    """DE: vLLM is done with a request. Its device blocks are kept for its owner when `held`."""

    request_id: str
    owner: Owner
    held: bool
    reason: str
    token_ids: list[int] = field(default_factory=list)
    computed_tokens: int = 0
    device_blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class PrefillStep:
    """A step of a prefill engine."""

    chunks: list[Chunk] = field(default_factory=list)


@dataclass(slots=True)
class DecodeStep:
    """A step of a decode engine, in the order in which it is to be applied."""

    preempted: list[Owner] = field(default_factory=list)
    """Their device blocks are given away with this step."""
    grown: list[tuple[Owner, int, list[int]]] = field(default_factory=list)
    """A sequence's device blocks from this position on."""
    progress: list[Progress] = field(default_factory=list)
    ended: list[End] = field(default_factory=list)
    declined: list[Owner] = field(default_factory=list)
    """vLLM takes nothing from them."""
    loads: list[Load] = field(default_factory=list)
