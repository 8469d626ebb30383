"""The agents of an experiment, the same for every system: generated ones or recorded sessions, without their pauses."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from dualpath.workload import AgentMix, Trajectory, WekaLimits, generate_trajectories, read_weka
from dualpath.workload.arrivals import poisson_arrivals_ns

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


def recorded_agents(traces: Sequence[Path], limits: WekaLimits, count: int | None) -> list[Trajectory]:
    """`count` agents, sessions dealt out in turn; None: one each. Raises TraceError."""
    sessions = [read_weka(path, limits) for path in traces]
    return [_renamed(sessions[index % len(sessions)], f"agent-{index:04d}") for index in range(count or len(sessions))]


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


def _renamed(session: Trajectory, identity: str) -> Trajectory:
    """The session under a name of its own, so that two agents with one session have tokens of their own."""
    rounds = tuple(
        msgspec.structs.replace(
            round_,
            gap_s=0.0,
            subagents=tuple(
                _renamed(subagent, f"{identity}/{index}.{number}") for number, subagent in enumerate(round_.subagents)
            ),
        )
        for index, round_ in enumerate(session.rounds)
    )
    return Trajectory(id=identity, rounds=rounds)
