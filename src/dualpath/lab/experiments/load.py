"""How much an experiment asks of which clusters, and the plan that follows.

A load says it for one point. Its axes name fields of the load and the values they take one after another: every
combination of them, on every topology, is a point of the plan.
"""

import itertools
from collections.abc import Iterator

import msgspec

from dualpath.lab.experiments.agents import arriving, generated_agents, recorded_agents
from dualpath.lab.experiments.assemble import measured_turns
from dualpath.lab.experiments.plan import Parameters, Plan, Point, runs_of
from dualpath.traces.generate import AgentMix
from dualpath.traces.limits import TraceLimits
from dualpath.traces.trajectory import Trajectory

AXES = ("agents", "turns", "context_tokens", "append_tokens", "generate_tokens", "spread", "agents_per_s")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Means of generated agents, or recorded sessions; topologies; systems. Raises ValueError naming the option."""

    topologies: tuple[str, ...] = ("1P1D",)
    systems: tuple[str, ...] = ("basic", "dualpath", "oracle")
    agents: int = 8
    turns: int = 3
    """Measured turns of an agent (at most, of a recorded one), after the one that brings its first context into
    storage.
    """
    context_tokens: float = 2000
    """At first."""
    append_tokens: float = 64
    generate_tokens: float = 16
    spread: float = 0.25
    """Of the generated lengths: standard deviation over mean."""
    agents_per_s: float | None = None
    """Poisson arrivals; None: all at once."""
    axes: dict[str, tuple[float, ...]] = {}
    snic_bytes_per_s: int | None = 40_000_000
    traces: tuple[str, ...] = ()
    """Recorded agents instead of generated ones: what `workload.load_source` takes."""
    scale: float = 16
    """Token counts of recorded sessions are divided by this."""
    max_context_tokens: int = 6144
    """A recorded session ends before its context grows beyond this."""

    def __post_init__(self) -> None:
        for name in ("topologies", "systems"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name}: name at least one, and each once, not {','.join(given) or 'nothing'}")
        for name, values in self.axes.items():
            if name not in AXES:
                raise ValueError(f"--values: {name!r} can't be varied; choose from {', '.join(AXES)}")
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--values {name}: give at least one value, and each once")
            if name in ("agents", "turns") and any(value != int(value) or value < 1 for value in values):
                raise ValueError(f"--values {name}: whole numbers from 1 up, not {values}")
        if self.agents < 1 or self.turns < 1:
            raise ValueError(f"--agents and --turns must be at least 1, not {self.agents} and {self.turns}")
        if self.agents_per_s is not None and self.agents_per_s <= 0:
            raise ValueError(f"agents_per_s must be above 0, not {self.agents_per_s:g}")

    @property
    def source(self) -> str:
        """Where the agents come from, in words."""
        if self.traces:
            sources = "source" if len(self.traces) == 1 else "sources"
            return f"recorded agents of {len(self.traces)} {sources}, token counts divided by {self.scale:g}"
        return (
            f"generated: contexts of {self.context_tokens:g} tokens at first, {self.append_tokens:g} appended and "
            f"{self.generate_tokens:g} generated a turn, where not varied"
        )

    def points(self) -> Iterator[tuple[Parameters, "Load"]]:
        """Every combination of the axes' values, and the load there."""
        for values in itertools.product(*self.axes.values()):
            varied: dict[str, float] = dict(zip(self.axes, values, strict=True))
            whole = {name: int(value) for name, value in varied.items() if name in ("agents", "turns")}
            yield dict(varied), msgspec.structs.replace(self, axes={}, **(varied | whole))


def make_plan(name: str, load: Load, seed: int, repeats: int) -> Plan:
    """Every point of `load`. Raises TraceError; ValueError where there is nothing to measure."""
    trajectories: dict[str, list[Trajectory]] = {}
    points: list[Point] = []
    for parameters, here in load.points():
        key = ", ".join(f"{axis}={value:g}" for axis, value in parameters.items()) or "agents"
        trajectories[key] = agents_of(here, seed)
        points += [
            Point(
                topology=topology,
                systems=load.systems,
                agents=key,
                parameters=parameters,
                agents_per_s=here.agents_per_s,
            )
            for topology in load.topologies
        ]
    return Plan(name=name, trajectories=trajectories, runs=runs_of(points, repeats), source=load.source)


def agents_of(load: Load, seed: int) -> list[Trajectory]:
    """The agents of one point. Raises TraceError, ValueError."""
    if load.traces:
        limits = TraceLimits(scale=load.scale, max_context_tokens=load.max_context_tokens, max_turns=1 + load.turns)
        agents = [agent for agent in recorded_agents(load.traces, limits, load.agents) if len(agent.rounds) > 1]
    else:
        mix = AgentMix(
            turns=1 + load.turns,
            first_context_tokens=load.context_tokens,
            append_tokens=load.append_tokens,
            generate_tokens=load.generate_tokens,
            spread=load.spread,
        )
        agents = generated_agents(mix, load.agents, seed)
    if not agents or measured_turns(agents) == 0:
        raise ValueError("nothing to measure: no agent has a turn after its first; raise --max-context or --scale")
    return agents if load.agents_per_s is None else arriving(agents, load.agents_per_s, seed)
