"""What an experiment runs, in order: each run is one system on one topology under one set of agents.

Runs that differ in nothing but system and repeat belong to one *point*; only within a point are systems compared, and
there they alternate, so that a machine that slows down slows all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from dualpath.traces.trajectory import Trajectory

Parameters = dict[str, float | str]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One place at which systems are compared."""

    topology: str
    systems: tuple[str, ...]
    agents: str
    """Key of its agents in `Plan.trajectories`."""
    parameters: Parameters = {}
    agents_per_s: float | None = None
    """Told in the result: the agents' first measured turns are that far apart already."""


class PlannedRun(msgspec.Struct, frozen=True):
    """One replay on one fresh cluster."""

    point: Point
    system: str
    repeat: int = 0

    @property
    def name(self) -> str:
        """``1P1D agents=8 basic #2``."""
        varied = "".join(f" {name}={_text(value)}" for name, value in self.point.parameters.items())
        return f"{self.point.topology}{varied} {self.system}" + (f" #{self.repeat + 1}" if self.repeat else "")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one invocation."""

    kind: Literal["demo", "experiment"] = "experiment"
    name: str
    trajectories: dict[str, list[Trajectory]]
    runs: list[PlannedRun]
    source: str
    """Where the agents come from, in words."""
    keep_trajectories: bool = True
    """Whether the result file has them: what `simulate --like` replays."""

    @property
    def topologies(self) -> list[str]:
        return list(dict.fromkeys(run.point.topology for run in self.runs))

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(run.system for run in self.runs))

    @property
    def repeats(self) -> int:
        return 1 + max(run.repeat for run in self.runs)

    def of(self, run: PlannedRun) -> list[Trajectory]:
        return self.trajectories[run.point.agents]


def runs_of(points: Iterable[Point], repeats: int) -> list[PlannedRun]:
    """Point by point; in each, every system once, then all of them again."""
    return [
        PlannedRun(point, system, repeat) for point in points for repeat in range(repeats) for system in point.systems
    ]


class WarmUp(msgspec.Struct, frozen=True):
    """First rounds that one cluster answers for all sets of agents in `keys`."""

    keys: frozenset[str]
    trajectories: list[Trajectory]
    """Of one round each."""


def warm_ups(trajectories: Mapping[str, Sequence[Trajectory]]) -> list[WarmUp]:
    """As few as there can be: sets whose agents of the same id begin alike share one.

    Ids seed tokens, so agents that begin with as many tokens begin with the same ones.
    """
    groups: list[tuple[set[str], dict[str, Trajectory]]] = []
    for key, agents in trajectories.items():
        first = {agent.id: _first_round(agent) for agent in agents}
        for keys, known in groups:
            if all(known.get(name, one) == one for name, one in first.items()):
                keys.add(key)
                known |= first
                break
        else:
            groups.append(({key}, first))
    return [WarmUp(frozenset(keys), list(known.values())) for keys, known in groups]


def _first_round(agent: Trajectory) -> Trajectory:
    return Trajectory(id=agent.id, rounds=(msgspec.structs.replace(agent.rounds[0], subagents=()),))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
