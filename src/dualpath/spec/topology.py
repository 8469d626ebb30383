"""``1P2D``: how many prefill and decode nodes a cluster has (paper §2). The one place that reads and writes it."""

import re

import msgspec

_TOPOLOGY = re.compile(r"([1-9]\d*)P([1-9]\d*)D", re.IGNORECASE)


class Topology(msgspec.Struct, frozen=True):
    """Prefill and decode nodes; on this runtime a node has one engine, one SNIC and one CNIC."""

    prefill_nodes: int
    decode_nodes: int

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Raises ValueError."""
        match = _TOPOLOGY.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a topology; write prefill and decode nodes like 1P1D or 1P2D")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.prefill_nodes}P{self.decode_nodes}D"

    @property
    def pooled(self) -> float:
        """(P + D) / P: how much more storage bandwidth all NICs have than the prefill nodes' alone."""
        return (self.prefill_nodes + self.decode_nodes) / self.prefill_nodes
