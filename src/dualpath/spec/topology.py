"""``1P2Dx4``, ``1Px4+2Dx2``: nodes and their engines (paper §2). No other place reads or writes the text."""

import re
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

_ALIKE = re.compile(r"([1-9]\d*)P([1-9]\d*)D(?:x([1-9]\d*))?", re.IGNORECASE)
_GROUP = re.compile(r"([1-9]\d*)([PD])(?:x([1-9]\d*))?", re.IGNORECASE)
_MOST_DIGITS = 9

Value = TypeVar("Value")
Rates = int | tuple[int, ...] | None
"""Bytes per second of every node's NICs, or of each group's; None: no limit."""


class NodeGroup(msgspec.Struct, frozen=True):
    """Nodes that are alike. The engines of a node share its SNIC and DRAM; each has a CNIC of its own."""

    kind: Literal["P", "D"]
    nodes: int
    engines: int = 1
    """Of each node."""

    def __str__(self) -> str:
        return f"{self.nodes}{self.kind}" + (f"x{self.engines}" if self.engines > 1 else "")


@dataclass(frozen=True, init=False)
class Topology:
    """Groups of nodes, prefill nodes first."""

    groups: tuple[NodeGroup, ...]

    def __init__(self, prefill_nodes: int, decode_nodes: int, engines_per_node: int = 1) -> None:
        """Nodes that differ in their kind alone; `parse` makes others. Raises ValueError."""
        numbers = (prefill_nodes, decode_nodes, engines_per_node)
        if min(numbers) < 1:
            raise ValueError(f"a topology has one node of each kind and one engine a node, or more, not {numbers}")
        groups = NodeGroup("P", prefill_nodes, engines_per_node), NodeGroup("D", decode_nodes, engines_per_node)
        object.__setattr__(self, "groups", groups)

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Parse text such as ``1P2D``, ``1P2Dx4`` or ``1Px4+2Dx2``. Raises ValueError."""
        alike = _ALIKE.fullmatch(text.strip())
        if alike is not None and len(text) <= 3 * _MOST_DIGITS:
            return cls(int(alike[1]), int(alike[2]), int(alike[3] or 1))
        found = [_GROUP.fullmatch(part.strip()) for part in text.split("+")]
        groups = [
            NodeGroup("P" if match[2] in "Pp" else "D", int(match[1]), int(match[3] or 1))
            for match in found
            if match is not None and len(match[0]) <= 2 * _MOST_DIGITS
        ]
        kinds = "".join(group.kind for group in groups)
        if len(groups) < len(found) or not re.fullmatch("P+D+", kinds):
            raise ValueError(
                f"{text!r} is not a topology; write prefill and decode nodes like 1P1D or 1P2D, 1P2Dx4 for four "
                "engines a node, or nodes that differ like 1Px4+2Dx2, prefill nodes first"
            )
        topology = object.__new__(cls)
        object.__setattr__(topology, "groups", tuple(groups))
        return topology

    def __str__(self) -> str:
        if [group.kind for group in self.groups] == ["P", "D"] and self.groups[0].engines == self.groups[1].engines:
            return f"{self.prefill_nodes}P{self.groups[1]}"
        return "+".join(map(str, self.groups))

    @property
    def sizes(self) -> list[int]:
        """Engines of each node, prefill nodes first."""
        return [group.engines for group in self.groups for _ in range(group.nodes)]

    @property
    def prefill_nodes(self) -> int:
        """P."""
        return sum(group.nodes for group in self.groups if group.kind == "P")

    @property
    def decode_nodes(self) -> int:
        """D."""
        return self.nodes - self.prefill_nodes

    @property
    def prefill_engines(self) -> int:
        return sum(self.sizes[: self.prefill_nodes])

    @property
    def decode_engines(self) -> int:
        return self.engines - self.prefill_engines

    @property
    def nodes(self) -> int:
        return sum(group.nodes for group in self.groups)

    @property
    def engines(self) -> int:
        return sum(self.sizes)

    def by_node(self, rates: Value | tuple[Value, ...]) -> list[Value]:
        """Returns each node's rate, from one for all or one for each group. Raises ValueError."""
        each = rates if isinstance(rates, tuple) else (rates,) * len(self.groups)
        if len(each) != len(self.groups):
            raise ValueError(
                f"{len(each)} rates for {self}, which has {len(self.groups)} groups of nodes; give one rate for all, "
                "or one for each group, such as 100MB/s+50MB/s"
            )
        return [rate for rate, group in zip(each, self.groups, strict=True) for _ in range(group.nodes)]

    def pooled(self, snics: float | tuple[float, ...] | None = None) -> float:
        """The rate of all nodes' SNICs over that of the prefill nodes' alone: (P + D) / P for equal ones."""
        rates = [1 if rate is None else rate for rate in self.by_node(snics)]
        return sum(rates) / sum(rates[: self.prefill_nodes])
