"""The agents of an experiment, the same for every system: generated ones or recorded sessions, without their pauses."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dualpath.traces.arrivals import poisson_arrivals_ns
from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import load_source
from dualpath.traces.trajectory import Trajectory

FIRST_ANSWER_TOKENS = 16
"""Generated in the first turn, whatever `AgentMix` says of later ones: sweeps then begin alike and share a warm-up."""


def generated_agents(mix: AgentMix, count: int, seed: int) -> list[Trajectory]:
    """`generate_trajectories`, with first answers of FIRST_ANSWER_TOKENS."""
    return [
        Trajectory(
            id=agent.id,
            rounds=(
                msgspec.structs.replace(agent.rounds[0], generate_tokens=FIRST_ANSWER_TOKENS),
                *agent.rounds[1:],
            ),
        )
        for agent in generate_trajectories(mix, count, seed)
    ]


def recorded_agents(traces: Sequence[str | Path], limits: TraceLimits, count: int | None) -> list[Trajectory]:
    """`count` agents of what `workload.load_source` takes, dealt out in turn; None: one each. Raises TraceError."""
    source = load_source([str(trace) for trace in traces], limits, agents=count)
    return [_without_pauses(agent) for agent in source.agents(count)]


def arriving(agents: Sequence[Trajectory], agents_per_s: float, seed: int) -> list[Trajectory]:
    """The same agents, the first measured turn of each put off until it arrives: Poisson arrivals."""
    starts_ns = poisson_arrivals_ns(agents_per_s, len(agents), seed)
    return [
        Trajectory(
            id=agent.id,
            rounds=(
                agent.rounds[0],
                msgspec.structs.replace(agent.rounds[1], gap_s=int(start_ns) / 1e9),
                *agent.rounds[2:],
            ),
        )
        for agent, start_ns in zip(agents, starts_ns, strict=True)
    ]


def _without_pauses(agent: Trajectory) -> Trajectory:
    rounds = tuple(
        msgspec.structs.replace(round_, gap_s=0.0, subagents=tuple(map(_without_pauses, round_.subagents)))
        for round_ in agent.rounds
    )
    return Trajectory(id=agent.id, rounds=rounds)
