"""``1P2D``: how many prefill and decode nodes a cluster has (paper §2). The one place that reads and writes it."""

import re

import msgspec

_TOPOLOGY = re.compile(r"([1-9]\d*)P([1-9]\d*)D", re.IGNORECASE)


class Topology(msgspec.Struct, frozen=True):
    """Number of prefill and decode nodes; in a cluster of ours a node has one engine, one SNIC and one CNIC."""

    prefill_nodes: int
    decode_nodes: int

    def __post_init__(self) -> None:
        if min(self.prefill_nodes, self.decode_nodes) < 1:
            raise ValueError(f"a topology has at least one node of each kind, not {self}; write 1P1D or more")

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse text such as ``1P2D``. Raises ValueError."""
        match = _TOPOLOGY.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a topology; write prefill and decode nodes like 1P1D or 1P2D")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.prefill_nodes}P{self.decode_nodes}D"

    @property
    def pooled(self) -> float:
        """(P + D) / P: the storage bandwidth of all NICs over that of the prefill nodes' alone."""
        return (self.prefill_nodes + self.decode_nodes) / self.prefill_nodes
