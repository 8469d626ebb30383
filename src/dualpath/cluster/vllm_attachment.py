"""What a node agent and the workers of a vLLM server say to each other, beside the records of `attachment`.

A worker is one process of a vLLM engine: one with tensor parallelism of 1, else one for each rank. Every worker of an
engine attaches with `AttachWorker`, gets `Attached`, and maps the engine's buffer. A decode engine's workers answer the
same calls as an embedded one (`Admit`, `Fill`, `Begin`, `CopyOut`, `Stop`, `Release`), and tell with `Generated` what
vLLM has made. A sequence that is stopped or released before `Begin` will not be loaded: vLLM computes its prompt. A
prefill engine's workers are told with `Expect` where a prompt's KV comes from and goes to.

All workers of an engine take the same steps, and each tells what it has done in them, in order: the agent acts on a
record once it has that of every worker. Each sends `Beat` every second, also when it has nothing to do; the engine does
not live while one of them is silent, and is gone when the connection of one has ended.

KV bytes are never in a record: a page is one of the buffer that all workers map. They move in whole Layer Blocks.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from dualpath.cluster.attachment import (
    Admit,
    Attach,
    Attached,
    Beat,
    Begin,
    CopyOut,
    Fill,
    Leave,
    Owner,
    Release,
    Reply,
    Stop,
)
from dualpath.cluster.wire_types import Pages, Tokens
from dualpath.spec.bounds import MAX_ITEMS, Count, Name, Text


class AttachWorker(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Worker: it has its KV cache, and this is what its engine is. All workers of an engine say the same `engine`."""

    engine: Attach
    rank: Count
    workers: Count
    """How many workers the engine has; ``0 <= rank < workers``."""
    url: Text
    """Where the engine's HTTP server is, such as ``http://127.0.0.1:8101``."""
    model: Name
    """The name by which that server knows its model."""
    dp_rank: Count | None = None
    """The engine's number among those behind the same URL; None: it is the only one."""


# ── agent → worker of a prefill engine ───────────────────────────────────────────────────────────────────────────────


class Expect(msgspec.Struct, frozen=True, tag=True):
    """A prompt is about to be sent to the engine; its KV belongs into these pages, one for each block.

    Such a prompt has ``kv_transfer_params={"dualpath": {"owner": owner, "hit_tokens": hit_tokens}}``.
    """

    owner: Owner
    pages: Pages
    hit_tokens: Count
    prompt_tokens: Count


class LayersReady(msgspec.Struct, frozen=True, tag=True):
    """The hit KV of layers ``[0, layers)`` is in the prompt's pages."""

    owner: Owner
    layers: Count


class Drop(msgspec.Struct, frozen=True, tag=True):
    """The attempt is over: touch its pages no more. Answered by one `Quiet`, also when it is not known.

    It also comes after a prompt that went well, when the pages are others' already: the worker may forget it.
    """

    owner: Owner


# ── worker → agent ───────────────────────────────────────────────────────────────────────────────────────────────────


class Saved(msgspec.Struct, frozen=True):
    """Blocks ``[first_block, first_block + blocks)`` of a prompt."""

    owner: Owner
    first_block: Count
    blocks: Count


class LayerSaved(msgspec.Struct, frozen=True, tag=True):
    """PE: this worker's part of a layer is in the pages of these blocks.

    A worker that has nothing to save of its own, because another rank saves what it has too (MLA), says so all the
    same: the agent ships a layer when all workers have said it.
    """

    layer: Count
    saved: Annotated[list[Saved], Meta(max_length=MAX_ITEMS)]


class StepSaved(msgspec.Struct, frozen=True, tag=True):
    """PE: a step is over; so many tokens of each prompt are in its pages, in all layers."""

    computed: Annotated[list[tuple[Owner, Count]], Meta(max_length=MAX_ITEMS)]


class Quiet(msgspec.Struct, frozen=True, tag=True):
    """PE: this worker does not touch the attempt's pages any more."""

    owner: Owner


class Generated(msgspec.Struct, frozen=True, tag=True):
    """DE, rank 0: the next tokens of a sequence; with a reason, they are the last ones."""

    sequence: Count
    token_ids: Tokens
    finish_reason: Name | None = None


WorkerCall = Admit | Fill | Begin | CopyOut | Release
ToWorker = Attached | WorkerCall | Stop | Expect | LayersReady | Drop | Leave
Told = LayerSaved | StepSaved | Quiet | Generated
FromWorker = Reply | Beat | Told
