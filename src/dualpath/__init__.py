"""DualPath: every storage NIC of a prefill-decode-disaggregated cluster as one pool (arXiv 2602.21548).

The names below are the public API (docs/api.md). They are imported when they are first used, so that
``import dualpath`` costs nothing and no one needs what they do not use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "dualpath.api": ("Answer", "AskError", "Server", "ask", "replay"),
    "dualpath.client.rollout": ("ReplayOptions",),
    "dualpath.cluster.config": ("ClusterConfig",),
    "dualpath.core.placement": ("PLACEMENTS", "RoundRobin", "TwoLevels"),
    "dualpath.core.policy": ("Policy",),
    "dualpath.core.read_path": ("READ_PATHS", "PathFacts", "ReadPath"),
    "dualpath.core.systems": ("SYSTEMS", "System", "find_system"),
    "dualpath.kv.stores": ("STORES",),
    "dualpath.lab.facts.profile": ("Profile", "load_profile"),
    "dualpath.lab.planning": ("CapacityPlan", "plan"),
    "dualpath.lab.sim.result": ("SimulationResult",),
    "dualpath.lab.sim.simulate": ("simulate",),
    "dualpath.model.checkpoint": ("DEMO_MODEL", "make_checkpoint"),
    "dualpath.results.cells": ("Cell", "cells_of"),
    "dualpath.results.file": ("ResultFile", "Run", "load_results"),
    "dualpath.results.frames": ("to_dataframe",),
    "dualpath.results.online": ("Slo",),
    "dualpath.results.turns": ("ReplayResult", "TurnResult"),
    "dualpath.spec.topology": ("Topology",),
    "dualpath.traces.generate": ("AgentMix", "generate_trajectories"),
    "dualpath.traces.sources": ("load_source",),
    "dualpath.traces.trajectory": ("Round", "Trajectory"),
    "dualpath.transfer": ("TRANSPORTS",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from dualpath.api import Answer, AskError, Server, ask, replay
    from dualpath.client.rollout import ReplayOptions
    from dualpath.cluster.config import ClusterConfig
    from dualpath.core.placement import PLACEMENTS, RoundRobin, TwoLevels
    from dualpath.core.policy import Policy
    from dualpath.core.read_path import READ_PATHS, PathFacts, ReadPath
    from dualpath.core.systems import SYSTEMS, System, find_system
    from dualpath.kv.stores import STORES
    from dualpath.lab.facts.profile import Profile, load_profile
    from dualpath.lab.planning import CapacityPlan, plan
    from dualpath.lab.sim.result import SimulationResult
    from dualpath.lab.sim.simulate import simulate
    from dualpath.model.checkpoint import DEMO_MODEL, make_checkpoint
    from dualpath.results.cells import Cell, cells_of
    from dualpath.results.file import ResultFile, Run, load_results
    from dualpath.results.frames import to_dataframe
    from dualpath.results.online import Slo
    from dualpath.results.turns import ReplayResult, TurnResult
    from dualpath.spec.topology import Topology
    from dualpath.traces.generate import AgentMix, generate_trajectories
    from dualpath.traces.sources import load_source
    from dualpath.traces.trajectory import Round, Trajectory
    from dualpath.transfer import TRANSPORTS

__all__ = [
    "DEMO_MODEL",
    "PLACEMENTS",
    "READ_PATHS",
    "STORES",
    "SYSTEMS",
    "TRANSPORTS",
    "AgentMix",
    "Answer",
    "AskError",
    "CapacityPlan",
    "Cell",
    "ClusterConfig",
    "PathFacts",
    "Policy",
    "Profile",
    "ReadPath",
    "ReplayOptions",
    "ReplayResult",
    "ResultFile",
    "Round",
    "RoundRobin",
    "Run",
    "Server",
    "SimulationResult",
    "Slo",
    "System",
    "Topology",
    "Trajectory",
    "TurnResult",
    "TwoLevels",
    "__version__",
    "ask",
    "cells_of",
    "find_system",
    "generate_trajectories",
    "load_profile",
    "load_results",
    "load_source",
    "make_checkpoint",
    "plan",
    "replay",
    "simulate",
    "to_dataframe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dualpath' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
