"""What a node agent and the engine processes of its node say to each other: records over Unix sockets, KV in memory.

An engine computes and its agent does everything else. The engine connects to its agent's socket and sends `Attach`; the
agent makes the engine's buffer and answers `Attached`. From then on the agent calls the engine, and each call gets one
`Reply` or `BatchDone` with its number; `Steps` and `Beat` come unasked. A prefill engine opens two connections more,
one for its loader thread and one for its shipper thread (`LayerThread`), on which it calls the agent (`LayerCall`).

KV bytes are never in a record. A page is one of the buffer pool, which the engine maps; a span is a range of the
engine's rows (`SharedRows`), which the agent maps.
"""

import signal
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.messages import Draw
from dualpath.cluster.orders import EngineOrder, OrderDone
from dualpath.cluster.wire_types import Figures, Logprobs, Pages, Tokens
from dualpath.core.vocabulary import Role
from dualpath.kv.layout import KVLayout
from dualpath.spec.bounds import MAX_ITEMS, Count, Name, Text, TokenId
from dualpath.spec.sampling import SamplingParams, TokenHistory

LISTENS = "listens for engines"
"""What an agent tells its supervisor once engines can attach."""
LEAVE = signal.SIGUSR1
"""Tells an agent to end, with its engines."""
Owner = tuple[Count, Count]
"""``(request, attempt)``."""
Span = tuple[Count, Count]
"""First byte and number of bytes in an engine's rows."""
Way = Literal["load", "ship"]


# ── an engine attaches ───────────────────────────────────────────────────────────────────────────────────────────────


class AttentionFigures(msgspec.Struct, frozen=True):
    """The measured time of an attention layer, for the compute quota (paper §6.2); see `AttentionCost` in core."""

    fixed_ns: float
    ns_per_flop: float
    flops_per_token: float
    flops_per_pair: float


class Attach(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Engine: it has loaded its model, and this is what it is."""

    role: Role
    name: Name
    pid: Count
    layout: KVLayout
    model_fingerprint: Name
    max_model_len_tokens: Count
    vocab_size: Count
    eos_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ITEMS)]
    hbm_blocks: Count = 0
    """Device memory for KV of a decode engine, in Full Blocks."""
    prefill_tokens_per_s: float | None = None
    attention: AttentionFigures | None = None
    """Of a prefill engine."""
    scores_prompts: bool = True
    ticket: Name
    """See `messages.Join`."""
    rows_path: Text = ""
    """File of a prefill engine's `SharedRows`."""


class LayerThread(msgspec.Struct, frozen=True, tag=True):
    """Engine: this connection is for one of its threads; `attachment` is from `Attached`."""

    attachment: Name
    way: Way


class Attached(msgspec.Struct, frozen=True, tag=True):
    """Agent: the engine's buffer is at `pool_path`. `attachment` is a secret of these two."""

    attachment: Name
    pool_path: Text


# ── agent → engine ───────────────────────────────────────────────────────────────────────────────────────────────────


class Constrain(msgspec.Struct, frozen=True, tag=True):
    """Make what bends the attempt's draws; kept until it is used or forgotten."""

    call: Count
    owner: Owner
    sampling: SamplingParams
    history: TokenHistory | None


class Forget(msgspec.Struct, frozen=True, tag=True):
    """Drop what `Constrain` has made; it is not needed any more."""

    owner: Owner


class ChunkItem(msgspec.Struct, frozen=True):
    """One chunk of a prefill batch."""

    owner: Owner
    token_ids: Tokens
    past_tokens: Count
    sampling: SamplingParams | None
    """Of a prompt's last chunk: draw the next token."""
    generated_tokens: Count
    next_token_ids: Tokens | None = None
    """The tokens that follow the chunk's, where they are scored."""
    top: Count = 0


class RunBatch(msgspec.Struct, frozen=True, tag=True):
    """PE: compute a batch, layer by layer; answered by `BatchDone`."""

    call: Count
    items: Annotated[list[ChunkItem], Meta(max_length=MAX_ITEMS)]


class Admit(msgspec.Struct, frozen=True, tag=True):
    """DE: take device blocks for a sequence."""

    call: Count
    sequence: Count
    owner: Owner
    prompt_tokens: Count
    first_token: TokenId | None
    """None: a vLLM server draws it."""
    sampling: SamplingParams
    generated_tokens: Count


class Fill(msgspec.Struct, frozen=True, tag=True):
    """DE: copy pages to the device. Answered when they are copied, in the order of the calls about a sequence."""

    call: Count
    sequence: Count
    blocks: Annotated[list[tuple[Count, Count, Count]], Meta(max_length=MAX_ITEMS)]
    """Block, page, tokens."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """DE: decode the sequence from the next step on. A finish reason in the answer: its first token was the last."""

    call: Count
    sequence: Count


class CopyOut(msgspec.Struct, frozen=True, tag=True):
    """DE: copy a finished Full Block from the device into a page."""

    call: Count
    sequence: Count
    block: Count
    page: Count


class Stop(msgspec.Struct, frozen=True, tag=True):
    """DE: generate nothing more for the sequence."""

    sequence: Count


class Release(msgspec.Struct, frozen=True, tag=True):
    """DE: give the sequence's device blocks back, after every earlier call about it."""

    call: Count
    sequence: Count


class CarryOut(msgspec.Struct, frozen=True, tag=True):
    """An operator's order."""

    call: Count
    order: EngineOrder


class Leave(msgspec.Struct, frozen=True, tag=True):
    """End this process."""

    reason: Text
    failed: bool = False
    """True when a supervisor should see an exit code of failure."""
    refused: bool = False
    """True when it can't take part as it is, and would not the next time."""


Call = Constrain | RunBatch | Admit | Fill | Begin | CopyOut | Release | CarryOut
ToEngineProcess = Attached | Call | Forget | Stop | Leave

# ── engine → agent ───────────────────────────────────────────────────────────────────────────────────────────────────


class Reply(msgspec.Struct, frozen=True, tag=True):
    """The answer to a call. `refused`: what the request asks for can't be, on any engine."""

    call: Count
    error: Text = ""
    refused: bool = False
    finish_reason: Name | None = None
    order_done: OrderDone | None = None


class Scores(msgspec.Struct, frozen=True):
    """Log-probabilities at successive positions; see `messages.PromptLogprobs`."""

    token_ids: Annotated[list[Tokens], Meta(max_length=MAX_ITEMS)]
    logprobs: Logprobs
    ranks: Pages


class ChunkResult(msgspec.Struct, frozen=True):
    """The result of one chunk."""

    error: Text = ""
    refused: bool = False
    draw: Draw | None = None
    scores: Scores | None = None


class BatchDone(msgspec.Struct, frozen=True, tag=True):
    """A batch has been computed, or has failed as a whole (`error`)."""

    call: Count
    results: Annotated[list[ChunkResult], Meta(max_length=MAX_ITEMS)]
    error: Text = ""


class SequenceStep(msgspec.Struct, frozen=True):
    """One sequence's result of a decode step: a token, or the error that ended it."""

    sequence: Count
    draw: Draw | None
    finish_reason: Name | None = None
    error: Text = ""
    refused: bool = False


class Steps(msgspec.Struct, frozen=True, tag=True):
    """A decode step's results."""

    steps: Annotated[list[SequenceStep], Meta(max_length=MAX_ITEMS)]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The engine is alive; its own series."""

    gauges: Figures


FromEngineProcess = Reply | BatchDone | Steps | Beat

# ── a prefill engine's layer threads ─────────────────────────────────────────────────────────────────────────────────


class LayerCall(msgspec.Struct, frozen=True):
    """Load or ship one layer of the batch that runs; a span for each item, None where nothing is to be done."""

    layer: Count
    spans: Annotated[list[Span | None], Meta(max_length=MAX_ITEMS)]


class LayerResult(msgspec.Struct, frozen=True):
    """An error for each item, empty where it went well."""

    errors: Annotated[list[Text], Meta(max_length=MAX_ITEMS)]


# ── settings of the two kinds of process ─────────────────────────────────────────────────────────────────────────────


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that a node agent starts with."""

    coordinator: str
    cluster: ClusterConfig
    name: str
    """The node's, unique in the cluster."""
    socket: str
    """Where its engines attach: a Unix socket in a directory of the owner's alone."""
    ticket: str = ""
    """By which its supervisor knows it."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that an engine process starts with."""

    role: Role
    agent: str
    """Its agent's socket."""
    cluster: ClusterConfig
    name: str = ""
    ticket: str = ""
    """What its `Join` says; empty: it makes one itself."""
