"""Where a request's time went: the server reports it and a replay records it."""

import msgspec


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went, in seconds, from its arrival at the coordinator.

    The first four add up to the time to first token. They describe the attempt that produced the first token. The time
    of earlier attempts is in `scheduling_s`; later attempts lengthen `decode_s`.
    """

    scheduling_s: float
    """Until `Prepare` went to its DE: prefix lookup, waiting for a PE and a DE and for room in the DE buffer."""
    allocation_s: float
    """Until the DE had reserved its buffer blocks and, if the PE reads, the PE buffer was granted."""
    read_s: float
    """Until the last leg of its hit tokens had arrived from storage; 0 if allocation took longer or nothing was hit."""
    prefill_s: float
    """Until its first token: waiting for its batch, layerwise prefill and the transfer to the DE."""
    decode_s: float
    """From its first token to this step's token."""
    prefill_engine: str
    """A name such as ``PE0``: prefill engines are numbered in the order they joined."""
    decode_engine: str
    """A name such as ``DE1``."""
    pe_read_tokens: int
    """Hit tokens that the PE read from storage."""
    de_read_tokens: int
    kv_read_bytes: int = 0
    """Bytes of KV that these tokens were read as."""
    kv_unread_bytes: int = 0
    """Bytes of their KV that were left in storage, because they are of layers whose window has passed them."""
    attempts: int
    """Number of attempts so far, this one included."""
