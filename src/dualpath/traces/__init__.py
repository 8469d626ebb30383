"""Agents as trajectories of token counts, read from recordings or generated. This is the package's public face.

In a notebook::

    from dualpath.traces import TraceLimits, load_source, totals

    source = load_source(["sessions/", "mooncake@64:trace.jsonl"], TraceLimits(max_context_tokens=65_536))
    print(source.description, totals(source.trajectories))

Where to look: `trajectory` defines an agent, `sources` loads them, `formats` lists the formats (each has a reader
module, which builds on `reading`, `sharing` and `texts`), `limits` cuts them, `generate` and `paper` make agents,
`turn_table` holds them as columns, `arrivals` says when they start.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualpath.traces.arrivals import poisson_arrivals_ns
    from dualpath.traces.formats import FORMATS, Format
    from dualpath.traces.generate import AgentMix, generate_trajectories
    from dualpath.traces.limits import TraceLimits, limited
    from dualpath.traces.paper import PAPER_TRACES, TraceStatistics, fitted_table, paper_agents
    from dualpath.traces.reading import TraceError
    from dualpath.traces.sources import Source, load_source
    from dualpath.traces.trajectory import Round, RoundSpan, Totals, Trajectory, totals
    from dualpath.traces.turn_table import Agents, TurnTable

__all__ = [
    "FORMATS",
    "PAPER_TRACES",
    "AgentMix",
    "Agents",
    "Format",
    "Round",
    "RoundSpan",
    "Source",
    "Totals",
    "TraceError",
    "TraceLimits",
    "TraceStatistics",
    "Trajectory",
    "TurnTable",
    "fitted_table",
    "generate_trajectories",
    "limited",
    "load_source",
    "paper_agents",
    "poisson_arrivals_ns",
    "totals",
]
_HOMES = {
    "arrivals": ("poisson_arrivals_ns",),
    "formats": ("FORMATS", "Format"),
    "generate": ("AgentMix", "generate_trajectories"),
    "limits": ("TraceLimits", "limited"),
    "paper": ("PAPER_TRACES", "TraceStatistics", "fitted_table", "paper_agents"),
    "reading": ("TraceError",),
    "sources": ("Source", "load_source"),
    "trajectory": ("Round", "RoundSpan", "Totals", "Trajectory", "totals"),
    "turn_table": ("Agents", "TurnTable"),
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: a command's ``--help`` imports `formats` and must not wait for numpy."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
