"""Plans an experiment's runs, in order: each run is one system on one topology under one set of agents.

Runs that differ only in system and repeat belong to one *point*. Systems are compared only within a point, and there
they alternate, so a machine that slows down slows all of them. Agents are the same for every system; recorded ones do
not pause.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal

import msgspec

from dualpath.lab.experiments.conditions import GENERATED_AGENTS, Conditions, Parameters
from dualpath.results.cells import number
from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import load_source
from dualpath.traces.trajectory import Round, Trajectory, totals

FIRST_ANSWER_TOKENS = 16
"""Tokens generated in the first turn, whatever later ones generate: sweeps then begin alike and share a warm-up."""


class PlannedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One replay on one fresh cluster."""

    topology: str
    system: str
    agents: str
    """Key of the agents in `Series.trajectories`."""
    parameters: Parameters = {}
    agents_per_s: float | None = None
    """Rate of arrivals, for the result; the agents' first measured turns are already that far apart."""
    repeat: int = 0

    @property
    def name(self) -> str:
        """``1P1D agents=8 basic #2``."""
        varied = "".join(f" {name}={number(value)}" for name, value in self.parameters.items())
        return f"{self.topology}{varied} {self.system}" + (f" #{self.repeat + 1}" if self.repeat else "")


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one invocation."""

    kind: Literal["demo", "experiment"] = "experiment"
    name: str
    conditions: Conditions
    trajectories: dict[str, list[Trajectory]]
    runs: list[PlannedRun]

    def agents_of(self, run: PlannedRun) -> list[Trajectory]:
        return self.trajectories[run.agents]


def series_of(name: str, conditions: Conditions, seed: int, repeats: int) -> Series:
    """Plans `conditions` point by point; in each, every system once, then all of them again for the next repeat.

    Raises TraceError, and ValueError if there is nothing to measure.
    """
    trajectories: dict[str, list[Trajectory]] = {}
    runs: list[PlannedRun] = []
    for parameters, here in conditions.points():
        key = ", ".join(f"{axis}={number(value)}" for axis, value in parameters.items()) or "agents"
        trajectories[key] = agents_under(here, seed)
        runs += [
            PlannedRun(
                topology=topology,
                system=system,
                agents=key,
                parameters=parameters,
                agents_per_s=here.agents_per_s,
                repeat=repeat,
            )
            for topology, repeat, system in product(conditions.topologies, range(repeats), conditions.systems)
        ]
    kind: Literal["demo", "experiment"] = "demo" if name == "demo" else "experiment"
    return Series(kind=kind, name=name, conditions=conditions, trajectories=trajectories, runs=runs)


def agents_under(conditions: Conditions, seed: int) -> list[Trajectory]:
    """Returns the agents of one point. Raises TraceError, ValueError."""
    agents = _recorded(conditions) if conditions.traces else _generated(conditions, seed)
    if not agents:
        raise ValueError("nothing to measure: no agent has a turn after its first; raise --max-context or --scale")
    return agents if conditions.agents_per_s is None else arriving(agents, conditions.agents_per_s, seed)


def measured_turns(agents: Sequence[Trajectory]) -> int:
    """Counts the turns of a replay after the warm-up."""
    return totals(agents).rounds - len(agents)


def arriving(agents: Sequence[Trajectory], agents_per_s: float, seed: int) -> list[Trajectory]:
    """Returns the same agents with each one's first measured turn delayed until its Poisson arrival."""
    starts_ns = poisson_arrivals_ns(agents_per_s, len(agents), seed)
    return [
        _with_round(agent, 1, msgspec.structs.replace(agent.rounds[1], gap_s=int(start_ns) / 1e9))
        for agent, start_ns in zip(agents, starts_ns, strict=True)
    ]


def _generated(conditions: Conditions, seed: int) -> list[Trajectory]:
    mix = AgentMix(
        turns=1 + conditions.turns,
        first_context_tokens=conditions.context_tokens,
        append_tokens=conditions.append_tokens,
        generate_tokens=conditions.generate_tokens,
        spread=conditions.spread,
    )
    return [
        _with_round(agent, 0, msgspec.structs.replace(agent.rounds[0], generate_tokens=FIRST_ANSWER_TOKENS))
        for agent in generate_trajectories(mix, conditions.agents or GENERATED_AGENTS, seed)
    ]


def _recorded(conditions: Conditions) -> list[Trajectory]:
    """Returns recorded agents, reused in turn; drops those without a turn after the first."""
    limits = TraceLimits(
        scale=conditions.scale, max_context_tokens=conditions.max_context_tokens, max_turns=1 + conditions.turns
    )
    source = load_source(conditions.traces, limits, agents=conditions.agents)
    return [_without_pauses(agent) for agent in source.agents(conditions.agents) if len(agent.rounds) > 1]


def _with_round(agent: Trajectory, index: int, changed: Round) -> Trajectory:
    return Trajectory(id=agent.id, rounds=(*agent.rounds[:index], changed, *agent.rounds[index + 1 :]))


def _without_pauses(agent: Trajectory) -> Trajectory:
    rounds = tuple(
        msgspec.structs.replace(round_, gap_s=0.0, subagents=tuple(map(_without_pauses, round_.subagents)))
        for round_ in agent.rounds
    )
    return Trajectory(id=agent.id, rounds=rounds)


class WarmUp(msgspec.Struct, frozen=True):
    """First rounds that one cluster answers for all sets of agents in `keys`."""

    keys: frozenset[str]
    trajectories: list[Trajectory]
    """Trajectories of one round each."""


def warm_ups(trajectories: Mapping[str, Sequence[Trajectory]]) -> list[WarmUp]:
    """Returns as few warm-ups as possible: sets whose agents of the same id begin alike share one.

    Ids seed tokens, so agents whose first prompts are equally long begin with the same tokens.
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
