"""A system's role in a comparison: the baseline, an oracle, or a contender.

Facts about a system come from `core.systems`, so a system of another package is treated like ours.
"""

from collections.abc import Iterable, Sequence

from dualpath.core.read_path import find_read_path
from dualpath.core.systems import BASELINE, HEADLINE, SYSTEMS, system_or_unknown
from dualpath.spec.topology import Topology


def is_oracle(system: str) -> bool:
    """Whether I/O is free for the system: its time then bounds the others' and is no result of its own."""
    return system_or_unknown(system).policy.free_io


def oracle_among(systems: Iterable[str]) -> str | None:
    """Returns the first oracle, or None."""
    return next(filter(is_oracle, systems), None)


def contenders(systems: Iterable[str]) -> list[str]:
    """Returns the systems to compare with the baseline: all but the baseline and oracles, in order."""
    return [name for name in systems if name != BASELINE and not is_oracle(name)]


def foremost(systems: Iterable[str]) -> str | None:
    """Returns the contender that a chart highlights: the headline system, else the last registered, else the last."""
    competing = contenders(systems)
    if HEADLINE in competing:
        return HEADLINE
    known = [name for name in SYSTEMS.names() if name in competing]
    return next(reversed(known or competing), None)


def readers(system: str, engines: Sequence[str]) -> list[str]:
    """Returns those of `engines` (``PE0``, ``DE1``) whose storage NICs `system` may use."""
    side = _side(system)
    return [engine for engine in engines if side == "both" or engine.startswith(side)]


def reading_nics(system: str, topology: str) -> int:
    """Returns how many storage NICs of a cluster `system` may read with."""
    size = Topology.parse(topology)
    nics = {"PE": size.prefill_nodes, "DE": size.decode_nodes}
    return nics.get(_side(system), size.prefill_nodes + size.decode_nodes)


def _side(system: str) -> str:
    return find_read_path(system_or_unknown(system).policy.read_path).readers
