"""Messages like those of expert parallelism, which model execution sends all the time: their sizes and their rhythm.

In each layer of experts every rank sends each token of its batch to the ranks of its experts (*dispatch*), and these
send their results back (*combine*), an all-to-all each. With a copy for every token and expert, as DeepEP's low-latency
kernels send, and experts chosen evenly, a rank sends each other rank ``tokens × experts a token / ranks`` copies.

The setting is DeepEP's for decoding DeepSeek-V3 (docs/legacy.md of deepseek-ai/DeepEP): 128 tokens a rank, hidden size
7168, 8 experts a token, dispatch in FP8 with a float32 scale for 128 values, combine in BF16, at 50 GB/s.
"""

import msgspec

TOKENS = 128
HIDDEN = 7168
EXPERTS_PER_TOKEN = 8
DISPATCH_BYTES = HIDDEN + HIDDEN // 128 * 4
"""Of one token, for one expert."""
COMBINE_BYTES = 2 * HIDDEN
LINK_BYTES_PER_S = 50_000_000_000
SLOWER = 10
"""An all-to-all takes this many times as long as on the real link, since our threads take longer than a GPU's as well:
at the link's own scale 0.1 ms of bytes would vanish in 0.3 ms of waking up."""
SHARE = 0.2
"""Of the link. DeepEP's two all-to-alls take 0.19 ms with 8 ranks and 0.55 with 256; a layer of 61 at 50 ms a token has
0.82."""


class Messages(msgspec.Struct, frozen=True):
    """What a rank sends again and again: `sizes_bytes` to each other rank, one after another, in every `period_ns`."""

    sizes_bytes: tuple[int, ...]
    period_ns: int

    def bytes_per_s(self, peers: int) -> float:
        """Returns what a rank sends to that many others."""
        return sum(self.sizes_bytes) * peers * 1e9 / self.period_ns


def expert_traffic(rate_bytes_per_s: int, ranks: int, share: float = SHARE) -> Messages:
    """Returns a layer's two all-to-alls, scaled to a NIC of that rate, of which they take `share`.

    The batch shrinks with the link, to whole tokens. Raises ValueError for fewer than two ranks or no share.
    """
    if ranks < 2 or not 0 < share < 1:
        raise ValueError(f"{ranks} ranks with {share} of the link; at least two send, and more than 0 and less than 1")
    tokens = min(max(round(TOKENS * SLOWER * rate_bytes_per_s / LINK_BYTES_PER_S), 1), TOKENS)
    copies = tokens * EXPERTS_PER_TOKEN / ranks
    sizes_bytes = (round(copies * DISPATCH_BYTES), round(copies * COMBINE_BYTES))
    wire_s = sum(sizes_bytes) * (ranks - 1) / rate_bytes_per_s
    return Messages(sizes_bytes, round(wire_s / share * 1e9))
