"""What an engine tells its coordinator. Its node's agent speaks for it."""

from typing import Annotated

import msgspec
from msgspec import Meta

from dualpath.cluster.orders import OrderDone
from dualpath.cluster.wire_types import Address, Figures, Key, Logprobs, Pages
from dualpath.cluster.wire_types import Tokens as TokenIds
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.kv.layout import KVLayout
from dualpath.spec.bounds import MAX_ITEMS, Count, Name, Text, TokenId


class Draw(msgspec.Struct, frozen=True):
    """A generated token: its id and, if requested, log-probabilities (chosen first, then the top ones)."""

    token_id: TokenId
    logprobs: Annotated[list[tuple[TokenId, float]], Meta(max_length=MAX_ITEMS)] | None = None


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
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ITEMS)]
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
    transport: Name = ""
    """How it moves KV: a name of `dualpath.transfer.TRANSPORTS`."""
    kernel: Name = ""
    """The boot id of the kernel that it runs on, which containers of a host share; empty where that is not told."""
    url: Text = ""
    """Of a vLLM server: where requests are posted, such as ``http://10.0.0.2:8101``. Empty: an engine of our own."""
    model: Name = ""
    """The name by which that server knows its model."""
    dp_rank: Count | None = None
    """The engine's number among those behind the same URL; None: it is the only one."""


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
    """PE: the prompt's KV is complete in the DE buffer, and the PE holds nothing of it. Carries the first token.

    A vLLM server gives none: the one that decodes draws it.
    """

    request: Count
    attempt: Count
    draw: Draw | None


class PromptLogprobs(msgspec.Struct, frozen=True, tag=True):
    """PE: log-probabilities of successive prompt tokens, the next ones after those told before; the first is token 1.

    Each row of `token_ids` and `logprobs` has the prompt's token, then the most likely ones. One message a chunk.
    """

    request: Count
    attempt: Count
    token_ids: Annotated[list[TokenIds], Meta(max_length=MAX_ITEMS)]
    logprobs: Logprobs
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
