"""Control messages between the coordinator and its engines: msgspec records over ZeroMQ, no pickle, no KV bytes.

Every message about a request names `(request, attempt)`; the receiver drops a message of an older attempt. Messages to
engines follow core's commands one to one, with the payload that the engine needs to carry them out.
"""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from dualpath.cluster.orders import DropWeights, OrderDone, ReadWeights, ReleaseMemory, RestoreMemory, UseWeights
from dualpath.cluster.wire_types import (
    MAX_ITEMS,
    Address,
    Count,
    Figures,
    Key,
    Keys,
    Legs,
    Name,
    Pages,
    Text,
    TokenId,
)
from dualpath.cluster.wire_types import Tokens as TokenIds
from dualpath.core.vocabulary import Cause, Leg, Role, Side
from dualpath.kv.keys import Namespace
from dualpath.kv.layout import KVLayout
from dualpath.spec.sampling import SamplingParams, TokenHistory

CONTROL_QUEUE_MESSAGES = 100_000
"""Bound of each control queue. An engine with this many unread messages is lost already."""


class Draw(msgspec.Struct, frozen=True):
    """A generated token: its id and, if requested, log-probabilities (chosen first, then the top ones)."""

    token_id: TokenId
    logprobs: Annotated[list[tuple[TokenId, float]], Meta(max_length=MAX_ITEMS)] | None = None


# ── engine → coordinator ─────────────────────────────────────────────────────────────────────────────────────────────


class Join(msgspec.Struct, frozen=True, tag=True):
    """An engine has loaded its model and asks to join."""

    role: Role
    pid: Count
    host: Name
    buffer_blocks: Count
    hbm_blocks: Count
    data_address: Address
    layout: KVLayout
    model_fingerprint: Name
    max_model_len_tokens: Count
    vocab_size: Count
    eos_token_ids: tuple[TokenId, ...]
    prefill_tokens_per_s: float | None = None
    """A PE's prompt tokens per second, hits included, measured on an agent's turn; the scheduler's β needs it."""
    name: Name = ""
    """What its process is called in logs, such as ``prefill-0``."""
    ticket: Name = ""
    """The member's own secret, the same in each of its Joins: by it the coordinator knows a member that comes back, and
    the supervisor the process that it started."""
    node: Name = ""
    """The name of its node, unique in the cluster; engines of a node share its SNIC. Empty: a node of its own."""
    agent_pid: Count = 0
    """The process that holds its buffer and moves its bytes: its node's agent."""
    agent_ticket: Name = ""
    """That process's, for the supervisor."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The engine is alive, and these are its series. Those of another version may not be in the catalogue."""

    gauges: Figures


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """DE: these DE buffer pages are reserved for the prompt, in block order."""

    request: Count
    attempt: Count
    pages: Pages


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A leg is in the buffer and verified."""

    request: Count
    attempt: Count
    side: Side


class BlockFaultReport(msgspec.Struct, frozen=True):
    """A block that could not be read, and why (a `kv.stores.errors.BlockFault` value)."""

    key: Key
    fault: Name


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """A leg could not be read. The blocks in `faults` are unreadable and must never be served again.

    Without any fault, this engine can't reach the store, and no block is bad.
    """

    request: Count
    attempt: Count
    side: Side
    faults: Annotated[list[BlockFaultReport], Meta(max_length=MAX_ITEMS)]


class PrefillDone(msgspec.Struct, frozen=True, tag=True):
    """PE: the prompt's KV is complete in the DE buffer, and the PE holds nothing of it. Carries the first token."""

    request: Count
    attempt: Count
    draw: Draw


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """PE: log-probabilities of successive prompt tokens, the next ones after those told before; the first is token 1.

    Each row of `token_ids` and `logprobs` has the prompt's token, then the most likely ones. One message a chunk.
    """

    request: Count
    attempt: Count
    token_ids: Annotated[list[TokenIds], Meta(max_length=MAX_ITEMS)]
    logprobs: Annotated[list[list[float]], Meta(max_length=MAX_ITEMS)]
    ranks: Pages


class Refused(msgspec.Struct, frozen=True, tag=True):
    """What the request asks for can't be done, on any engine: no other attempt would help. `detail` is for the client.

    The engine keeps the attempt's blocks until `AbortAttempt`.
    """

    request: Count
    attempt: Count
    detail: Text


class AttemptFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot continue this attempt; it keeps the attempt's blocks until `AbortAttempt`."""

    request: Count
    attempt: Count
    cause: Cause
    detail: Text


class StepTokens(msgspec.Struct, frozen=True):
    """One sequence's tokens of a decode step."""

    request: Count
    attempt: Count
    draw: Draw


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """DE: the tokens of one decode step."""

    step: Annotated[list[StepTokens], Meta(max_length=MAX_ITEMS)]


class BufferFreed(msgspec.Struct, frozen=True, tag=True):
    """DE: pages of the DE buffer have been freed."""

    request: Count
    attempt: Count
    blocks: Count


class StoredBlock(msgspec.Struct, frozen=True):
    """A Full Block that is durable and verified; `root` is its namespace's root key."""

    root: Key
    key: Key
    parent: Key
    physical_bytes: Count
    salted: bool = False
    """Whether it is of a tenant's own namespace."""
    token_ids: TokenIds = []
    """Of a block with generated tokens; the coordinator knows those of prompts."""


class Stored(msgspec.Struct, frozen=True, tag=True):
    """DE: these blocks may be published, in this order."""

    blocks: Annotated[list[StoredBlock], Meta(max_length=MAX_ITEMS)]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """DE: generation has ended, every full block is persisted, and nothing is held."""

    request: Count
    attempt: Count
    finish_reason: Name


class Released(msgspec.Struct, frozen=True, tag=True):
    """Answer to `AbortAttempt`: no transfer can touch the attempt's blocks any more, and all are free.

    A PE sets `quiet` to False when a transfer of the attempt failed half-way. Its bytes may still be on their way to
    the DE, which must disconnect this engine before it frees the attempt's pages.
    """

    request: Count
    attempt: Count
    quiet: bool = True


class Leave(msgspec.Struct, frozen=True, tag=True):
    """The engine leaves: it was shut down or cannot continue (`reason`)."""

    reason: Text


FromEngine = (
    Join
    | Heartbeat
    | Prepared
    | Loaded
    | LoadFailed
    | PrefillDone
    | PromptLogprobs
    | AttemptFailed
    | Refused
    | Tokens
    | BufferFreed
    | Stored
    | Finished
    | Released
    | OrderDone
    | Leave
)


# ── coordinator → engine ─────────────────────────────────────────────────────────────────────────────────────────────


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The engine is admitted; its id is `engine`. `epoch` is the coordinator's: each one that starts has its own."""

    engine: Count
    epoch: Count = 0


class PrepareDecode(msgspec.Struct, frozen=True, tag=True):
    """DE: reserve pages for the whole prompt; `keys` name its full blocks (hit ones first)."""

    request: Count
    attempt: Count
    prompt_tokens: Count
    hit_tokens: Count
    namespace: Namespace
    keys: Keys


class LoadLeg(msgspec.Struct, frozen=True, tag=True):
    """Read `keys` (blocks `leg.first_block`…) from storage into the buffer."""

    request: Count
    attempt: Count
    leg: Leg
    namespace: Namespace
    keys: Keys


class StartPrefill(msgspec.Struct, frozen=True, tag=True):
    """PE: compute `miss_token_ids` (positions `hit_tokens`…) and put the prompt's KV into the peer's pages."""

    request: Count
    attempt: Count
    hit_tokens: Count
    miss_token_ids: TokenIds
    legs: Legs
    decode_engine: Count
    decode_address: Address
    decode_pages: Pages
    sampling: SamplingParams
    generated_tokens: Count
    """Number of tokens that earlier attempts have sent to the client; they are part of this prompt."""
    history: TokenHistory | None = None
    """What the draw must know of earlier tokens, where the sampling asks for it."""


class StartDecode(msgspec.Struct, frozen=True, tag=True):
    """DE: the DE buffer is complete; continue from the first token."""

    request: Count
    attempt: Count
    draw: Draw
    tail_token_ids: TokenIds
    """Prompt tokens after the last full block, for the keys of later blocks."""
    sampling: SamplingParams
    generated_tokens: Count
    history: TokenHistory | None = None
    """As for `StartPrefill`; `draw` is its newest token."""


class AbortAttempt(msgspec.Struct, frozen=True, tag=True):
    """Stop the attempt, make sure that nothing of it moves, free everything, and answer `Released`.

    `lost_peer` is a PE that is lost or whose transfers failed half-way; disconnect it before freeing pages.
    """

    request: Count
    attempt: Count
    lost_peer: Count | None = None


class PeerJoined(msgspec.Struct, frozen=True, tag=True):
    """An engine of the other role has joined. A PE connects to the DE's buffer now, so that no prompt has to wait for
    that; a DE notes who may touch its buffer."""

    engine: Count
    data_address: Address


class PeerLost(msgspec.Struct, frozen=True, tag=True):
    """An engine is lost and proven dead: close the channel to it."""

    engine: Count
    data_address: Address


class HeartbeatAck(msgspec.Struct, frozen=True, tag=True):
    """The coordinator of this `epoch` is alive. A member that gets none of these for two leases takes it for lost."""

    epoch: Count = 0


class NotMember(msgspec.Struct, frozen=True, tag=True):
    """The coordinator does not know the engine, or no longer: it has restarted, or has counted the engine out.

    The engine may join again, once it has let go of all that it did as a member.
    """

    reason: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave now. `reason` says why: the cluster stops, or the coordinator has declared this engine lost."""

    reason: Text


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """Answer to a `Join` that is refused, with the reason."""

    reason: Text


ToEngine = (
    Welcome
    | Refusal
    | PrepareDecode
    | LoadLeg
    | StartPrefill
    | StartDecode
    | AbortAttempt
    | ReadWeights
    | UseWeights
    | DropWeights
    | ReleaseMemory
    | RestoreMemory
    | PeerJoined
    | PeerLost
    | HeartbeatAck
    | NotMember
    | Shutdown
)


to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)
encoder = msgspec.msgpack.Encoder()


Message = TypeVar("Message")


class BadMessageError(ValueError):
    """What a peer sent is no message of its kind."""


def from_engine(frames: list[bytes]) -> FromEngine:
    """Returns an engine's message; raises BadMessageError for whatever else comes."""
    message: FromEngine = _decoded(from_engine_decoder, frames)
    return message


def to_engine(frames: list[bytes]) -> ToEngine:
    """As `from_engine`, of the coordinator's."""
    message: ToEngine = _decoded(to_engine_decoder, frames)
    return message


def _decoded(decoder: "msgspec.msgpack.Decoder[Message]", frames: list[bytes]) -> Message:
    if len(frames) != 1:
        raise BadMessageError(f"a message has one frame, not {len(frames)}")
    try:
        return decoder.decode(frames[0])
    except Exception as error:  # of types, of UTF-8, of nesting: what a peer sends raises nothing else than this
        raise BadMessageError(f"{type(error).__name__}: {error}") from None
