"""The bottleneck-free range of P/D, in which all storage NICs run at full rate and no other link is too slow (§4.2).

Theory of operation. All P + D SNICs read at s·B, and load is even over the P·g × D·g pairs of engines. Prefill nodes
read T_p bytes of hit KV in all, decode nodes T_c. Each link then carries::

    read by a PE's node                                  read by a DE's node
    storage → PE DRAM          write                     storage → DE DRAM          write
    PE DRAM → PE HBM           read, PE CNIC r+w         DE DRAM → PE HBM           read, DE CNIC r, PE CNIC w
    PE HBM  → DE DRAM          write, PE CNIC r, DE w
    DE DRAM → DE HBM           read, DE CNIC r+w         DE DRAM → DE HBM           read, DE CNIC r+w

A copy between DRAM and a GPU passes the GPU's CNIC in both directions (§5). Miss tokens are few and not counted. With
r = P/D, u = s/g and b = B·s/M the utilisations are::

    PE CNIC read   2u            DE CNIC read    u·(r + 2)       PE DRAM   2b
    PE CNIC write  u·(1 + 1/r)   DE CNIC write   u·(2r + 1)      DE DRAM   b·(3 + 2r)

Each utilisation is at most 1 on one side of a value of r, or for no r at all; together they leave an interval.
"""

from __future__ import annotations

import math

import msgspec


class LinkLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of link when every SNIC runs at full rate."""

    link: str
    """Such as ``PE CNIC read``; CNIC directions are the NIC's (read: out of memory)."""
    bytes_per_s: float
    """Bytes per second on each such link."""
    utilisation: float
    """Load over the link's rate; above 1 it is the bottleneck."""
    least_ratio: float
    """Least P/D for which the link suffices; 0: any."""
    most_ratio: float
    """Largest P/D for which it suffices; inf: any; 0 or below: none."""


class BottleneckFree(msgspec.Struct, frozen=True, kw_only=True):
    """The interval, what bounds it, and the load of every link at the given P and D."""

    least_ratio: float
    most_ratio: float
    least_link: str
    """The link that gives out below `least_ratio`."""
    most_link: str
    """The link that gives out above `most_ratio`."""
    ratio: float
    """P/D of the given cluster."""
    loads: tuple[LinkLoad, ...]

    @property
    def is_empty(self) -> bool:
        """True if no P/D lets every SNIC run at full rate."""
        return self.least_ratio > self.most_ratio

    @property
    def binding(self) -> LinkLoad:
        """The link with the highest utilisation at `ratio`."""
        return max(self.loads, key=lambda load: load.utilisation)

    @property
    def is_free(self) -> bool:
        """Whether `ratio` is inside the range."""
        return self.binding.utilisation <= 1 + 1e-12

    @property
    def snic_share(self) -> float:
        """Share of their full rate at which all SNICs can run at `ratio` before another link is full."""
        return min(1.0, 1 / self.binding.utilisation)


def bottleneck_free(
    prefill_nodes: float,
    decode_nodes: float,
    engines_per_node: int,
    snic_ratio: float,
    cnic_bytes_per_s: float,
    dram_bytes_per_s: float,
) -> BottleneckFree:
    """Returns the range for the paper's P, D, g, s, B and M. Raises ValueError for anything not above zero."""
    given = (prefill_nodes, decode_nodes, engines_per_node, snic_ratio, cnic_bytes_per_s, dram_bytes_per_s)
    if not all(0 < value < math.inf for value in given):
        raise ValueError(f"P, D, g, s, B and M must all be above zero and finite, not {given}")
    ratio = prefill_nodes / decode_nodes
    loads = _loads(ratio, snic_ratio / engines_per_node, cnic_bytes_per_s, snic_ratio, dram_bytes_per_s)
    least = max(loads, key=lambda load: load.least_ratio)
    most = min(loads, key=lambda load: load.most_ratio)
    return BottleneckFree(
        least_ratio=least.least_ratio,
        most_ratio=most.most_ratio,
        least_link=least.link,
        most_link=most.link,
        ratio=ratio,
        loads=loads,
    )


def _loads(r: float, u: float, cnic: float, s: float, dram: float) -> tuple[LinkLoad, ...]:
    b = cnic * s / dram
    return (
        _load("PE CNIC read", cnic, 2 * u, most_ratio=_always(2 * u)),
        _load("PE CNIC write", cnic, u * (1 + 1 / r), least_ratio=u / (1 - u) if u < 1 else math.inf),
        _load("DE CNIC read", cnic, u * (r + 2), most_ratio=1 / u - 2),
        _load("DE CNIC write", cnic, u * (2 * r + 1), most_ratio=(1 / u - 1) / 2),
        _load("PE DRAM", dram, 2 * b, most_ratio=_always(2 * b)),
        _load("DE DRAM", dram, b * (3 + 2 * r), most_ratio=(1 / b - 3) / 2),
    )


def _always(utilisation: float) -> float:
    """Returns the bound of a link whose load doesn't depend on the ratio."""
    return math.inf if utilisation <= 1 else 0.0


def _load(
    link: str, rate: float, utilisation: float, least_ratio: float = 0.0, most_ratio: float = math.inf
) -> LinkLoad:
    return LinkLoad(
        link=link,
        bytes_per_s=utilisation * rate,
        utilisation=utilisation,
        least_ratio=least_ratio,
        most_ratio=most_ratio,
    )
