"""Where a request's time went: what the server tells and a replay keeps."""

import msgspec


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went, in seconds, from its arrival at the coordinator.

    The first four add up to the time to first token. They are of the attempt that gave the first token; what attempts
    before it took is in `scheduling_s`, and one after it lengthens `decode_s`.
    """

    scheduling_s: float
    """Until its DE was told: prefix lookup, waiting for a PE and a DE and for room in the DE buffer."""
    allocation_s: float
    """Until the DE had set its DE buffer aside and the PE buffer, if the PE reads, was granted."""
    read_s: float
    """Until the last leg of its hit tokens had arrived from storage; 0 where allocation took longer or none was hit."""
    prefill_s: float
    """Until its first token: waiting for its batch, layerwise prefill and the transfer to the DE."""
    decode_s: float
    """From its first token to this step's."""
    prefill_engine: str
    """``PE0``: prefill engines are numbered as they joined."""
    decode_engine: str
    """``DE1``."""
    pe_read_tokens: int
    """Hit tokens that the PE read from storage."""
    de_read_tokens: int
    attempts: int
    """So far, this one included."""
