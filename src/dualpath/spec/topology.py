"""``1P2Dx4``: prefill nodes, decode nodes, and engines of each node (paper §2). No other place reads or writes it."""

import re

import msgspec

_TOPOLOGY = re.compile(r"([1-9]\d*)P([1-9]\d*)D(?:x([1-9]\d*))?", re.IGNORECASE)


class Topology(msgspec.Struct, frozen=True):
    """Numbers of nodes and engines. The engines of a node share its SNIC and DRAM; each has a CNIC of its own."""

    prefill_nodes: int
    """P."""
    decode_nodes: int
    """D."""
    engines_per_node: int = 1
    """g."""

    def __post_init__(self) -> None:
        if min(self.prefill_nodes, self.decode_nodes, self.engines_per_node) < 1:
            raise ValueError(
                f"a topology has one node of each kind and one engine a node, or more, not {self}; write 1P1D or more"
            )

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse text such as ``1P2D`` or ``1P2Dx4``. Raises ValueError."""
        match = _TOPOLOGY.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a topology; write prefill and decode nodes like 1P1D or 1P2D, or 1P2Dx4 for four "
                "engines a node"
            )
        return cls(int(match[1]), int(match[2]), int(match[3] or 1))

    def __str__(self) -> str:
        engines = f"x{self.engines_per_node}" if self.engines_per_node > 1 else ""
        return f"{self.prefill_nodes}P{self.decode_nodes}D{engines}"

    @property
    def nodes(self) -> int:
        return self.prefill_nodes + self.decode_nodes

    @property
    def engines(self) -> int:
        return self.nodes * self.engines_per_node

    @property
    def pooled(self) -> float:
        """(P + D) / P: the storage bandwidth of all NICs over that of the prefill nodes' alone."""
        return self.nodes / self.prefill_nodes
