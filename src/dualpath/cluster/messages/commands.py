"""What a coordinator tells an engine: core's commands one to one, with the payload that carrying them out needs."""

import msgspec

from dualpath.cluster.messages.reports import Draw
from dualpath.cluster.orders import DropWeights, ReadWeights, ReleaseMemory, RestoreMemory, UseWeights
from dualpath.cluster.wire_types import Address, Keys, Legs, Pages
from dualpath.cluster.wire_types import Tokens as TokenIds
from dualpath.core.vocabulary import Leg
from dualpath.kv.keys import Namespace
from dualpath.spec.bounds import Count, Text
from dualpath.spec.sampling import SamplingParams, TokenHistory


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
    """Read `keys` (blocks `leg.first_block`…) of a hit from storage into the buffer."""

    request: Count
    attempt: Count
    leg: Leg
    hit_tokens: Count
    """Of the whole hit: its end says how much of a block layers with a window see."""
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
    hit_token_ids: TokenIds = []
    """For a vLLM server, which is given the whole prompt: the tokens before `miss_token_ids`."""


class StartDecode(msgspec.Struct, frozen=True, tag=True):
    """DE: the DE buffer is complete; continue from the first token, which a vLLM server draws itself (None)."""

    request: Count
    attempt: Count
    draw: Draw | None
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

    reason: Text


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
