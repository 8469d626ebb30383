"""The data types of core's interface: ids, facts about engines and requests, commands. Plain data without behaviour.

All times are integer nanoseconds of the driver's clock. All ids are integers that the driver gives and never reuses.
"""

from enum import Enum, IntEnum

import msgspec

from dualpath.spec import kv_bytes
from dualpath.spec.bounds import Count

BLOCK_TOKENS = kv_bytes.BLOCK_TOKENS
"""Tokens in a block (paper §3)."""

EngineId = int
NodeId = int
GroupId = int
RequestId = int


class Role(Enum):
    """What an engine does: prefill engine (PE) or decode engine (DE)."""

    PREFILL = "prefill"
    DECODE = "decode"


class Side(Enum):
    """Whose storage NIC reads hit KV (paper §4.1)."""

    PE = "pe"
    DE = "de"


class TrafficClass(IntEnum):
    """Two classes on every NIC (paper §5): model-execution messages, and everything else, KV included."""

    HIGH = 0
    LOW = 1


class Cause(Enum):
    """Why an attempt or a request ended badly. The value is what metrics and clients see."""

    ENGINE_LOST = "engine_lost"
    LOAD_FAILED = "load_failed"
    TRANSFER_FAILED = "transfer_failed"
    COMPUTE_FAILED = "compute_failed"
    TIMEOUT = "timeout"
    NO_ENGINE = "no_engine"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"


class EngineFacts(msgspec.Struct, frozen=True, gc=False):
    """An engine as it joins. One engine manages one GPU; all engines of a node have one group and one role (§2)."""

    engine: EngineId
    role: Role
    node: NodeId
    group: GroupId
    buffer_blocks: int
    """Capacity of its DRAM buffer (PE buffer or DE buffer) in Full Blocks."""
    hbm_blocks: int = 0
    """Capacity of a DE's device memory in Full Blocks of KV; 0 for a PE, which keeps only a few layers."""
    stages: bool = False
    """Whether a PE needs pages of its buffer for the whole prompt, whoever reads: an engine that is not ours computes
    from there and into there. Other PEs need pages for what they read alone."""


class RequestFacts(msgspec.Struct, frozen=True, gc=False):
    """One attempt at a request. Lengths in tokens; `hit_tokens` is a multiple of BLOCK_TOKENS and < `prompt_tokens`."""

    request: RequestId
    attempt: int
    prompt_tokens: int
    hit_tokens: int
    max_new_tokens: int


class Leg(msgspec.Struct, frozen=True, gc=False):
    """A run of Full Blocks that one side reads from storage into its buffer."""

    side: Side
    first_block: Count
    blocks: Count


# ── Commands: core's requests to its driver. A closed union; the driver matches on the type. ─────────────────────────


class Prepare(msgspec.Struct, frozen=True, gc=False, tag=True):
    """DE `engine` reserves `buffer_blocks` of its DE buffer for the whole prompt's KV and answers `prepared`.

    `hbm_blocks` of device memory are promised to the attempt from now on; the engine takes them only at `Decode`.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    buffer_blocks: int
    hbm_blocks: int


class Load(msgspec.Struct, frozen=True, gc=False, tag=True):
    """`engine` reads the leg from storage into its buffer and answers `loaded` or `load_failed`.

    On a DE, `Prepare` has reserved the buffer blocks; on a PE, this command reserves them.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    leg: Leg


class Prefill(msgspec.Struct, frozen=True, gc=False, tag=True):
    """PE `engine` queues the prompt, whose hit KV is loaded, for prefill and answers `prefill_done`.

    A PE that stages reserves with this command what the whole prompt needs beside the blocks of its leg.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    decode_engine: EngineId


class Decode(msgspec.Struct, frozen=True, gc=False, tag=True):
    """DE `engine`, whose DE buffer holds the whole prompt's KV, takes device memory, copies the KV in, and decodes. It
    answers `buffer_freed` when it has freed the DE buffer, and `finished` when it holds nothing of the attempt."""

    request: RequestId
    attempt: int
    engine: EngineId


class Abort(msgspec.Struct, frozen=True, gc=False, tag=True):
    """`engine` stops the attempt, waits until no transfer can touch its blocks, frees them, and answers `released`.

    A DE gets its Abort only after its PE has answered or is lost (`lost_peer`): then nobody writes into its blocks.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    lost_peer: EngineId | None = None


class Resubmit(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The driver matches the prompt, plus generated tokens, with the index again and calls `resubmit` (`attempt`)."""

    request: RequestId
    attempt: int
    cause: Cause


class Finish(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The request is complete."""

    request: RequestId


class Fail(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The driver tells the client that the request has failed; it will not be retried."""

    request: RequestId
    cause: Cause


class Cancelled(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The request has ended because its client went away."""

    request: RequestId


Command = Prepare | Load | Prefill | Decode | Abort | Resubmit | Finish | Fail | Cancelled
