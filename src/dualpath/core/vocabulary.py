"""The words core speaks: ids, facts about engines and requests, commands. Plain data, no behaviour worth a test.

All times are integer nanoseconds of the driver's clock. All ids are integers given by the driver and never reused.
"""

from enum import Enum, IntEnum

import msgspec

BLOCK_TOKENS = 64
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
    """An engine as it joins. One engine manages one GPU; all engines of a node are in one group, of one role (§2)."""

    engine: EngineId
    role: Role
    node: NodeId
    group: GroupId
    buffer_blocks: int
    """Full Blocks its DRAM buffer (PE buffer or DE buffer) holds."""
    hbm_blocks: int = 0
    """Full Blocks of KV a decode engine's device memory holds; 0 for a PE, which keeps only a few layers."""


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
    first_block: int
    blocks: int


# ── Commands: what core asks of its driver. A closed union; the driver matches on the type. ──────────────────────────


class Prepare(msgspec.Struct, frozen=True, gc=False, tag=True):
    """DE `engine`: set aside `buffer_blocks` of the DE buffer for the whole prompt's KV; answer `prepared`.

    `hbm_blocks` of device memory are promised to the attempt from now on; the engine takes them late, at `Decode`.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    buffer_blocks: int
    hbm_blocks: int


class Load(msgspec.Struct, frozen=True, gc=False, tag=True):
    """`engine`: read the leg from storage into your buffer; answer `loaded` or `load_failed`.

    On a DE the blocks were set aside by `Prepare`, on a PE they are set aside by this command.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    leg: Leg


class Prefill(msgspec.Struct, frozen=True, gc=False, tag=True):
    """PE `engine`: everything is where it must be; queue the prompt for prefill and answer `prefill_done`."""

    request: RequestId
    attempt: int
    engine: EngineId
    decode_engine: EngineId


class Decode(msgspec.Struct, frozen=True, gc=False, tag=True):
    """DE `engine`: the DE buffer holds the whole prompt's KV; take device memory, copy, decode; answer `buffer_freed`
    when the DE buffer is given back and `finished` when nothing of the attempt is held any more."""

    request: RequestId
    attempt: int
    engine: EngineId


class Abort(msgspec.Struct, frozen=True, gc=False, tag=True):
    """`engine`: stop the attempt, wait until no transfer can touch its blocks, give them back, answer `released`.

    A DE is told when its PE has answered, or is gone (`lost_peer`): nobody may write into its blocks any more.
    """

    request: RequestId
    attempt: int
    engine: EngineId
    lost_peer: EngineId | None = None


class Resubmit(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver: match the prompt (plus what was generated) against the index again and call `resubmit` with `attempt`."""

    request: RequestId
    attempt: int
    cause: Cause


class Finish(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver: the request is complete."""

    request: RequestId


class Fail(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver: tell the client; the request will not be tried again."""

    request: RequestId
    cause: Cause


class Cancelled(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver: the request ended because its client went away."""

    request: RequestId


Command = Prepare | Load | Prefill | Decode | Abort | Resubmit | Finish | Fail | Cancelled
