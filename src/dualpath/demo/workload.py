"""The agents of a demo: generated ones, or recorded sessions, the same for every system."""

from collections.abc import Sequence

import msgspec

from dualpath.demo.options import DemoOptions
from dualpath.report.result_file import Workload
from dualpath.workload import AgentMix, Trajectory, WekaLimits, generate_trajectories, read_weka, totals

DEFAULT_AGENTS = 12


def build_trajectories(options: DemoOptions) -> list[Trajectory]:
    """Each has a first round to warm up with and at most `options.turns` more. Raises TraceError, ValueError."""
    trajectories = _trajectories(options)
    if measured_turns(trajectories) == 0:
        raise ValueError("nothing to measure: no agent has a turn after its first; raise --max-context or --scale")
    return trajectories


def _trajectories(options: DemoOptions) -> list[Trajectory]:
    if not options.traces:
        mix = AgentMix(
            turns=1 + options.turns,
            first_context_tokens=options.first_context_tokens,
            append_tokens=options.append_tokens,
            generate_tokens=options.generate_tokens,
        )
        return generate_trajectories(mix, options.agents or DEFAULT_AGENTS, options.seed)
    limits = WekaLimits(scale=options.scale, max_context_tokens=options.max_context_tokens, max_turns=1 + options.turns)
    sessions = [read_weka(path, limits) for path in options.traces]
    count = options.agents or len(sessions)
    return [_renamed(sessions[index % len(sessions)], f"agent-{index:04d}") for index in range(count)]


def measured_turns(trajectories: Sequence[Trajectory]) -> int:
    """Turns that a replay after the warm-up makes."""
    return totals(trajectories).rounds - len(trajectories)


def describe(options: DemoOptions, trajectories: Sequence[Trajectory]) -> Workload:
    """The workload for the result file, without its warm-up."""
    every, first = totals(trajectories), [next(one.spans()) for one in trajectories]
    warm_tokens = sum(span.prompt_tokens for span in first)
    generated = f"generated, seed {options.seed}"
    traces = f"{len(options.traces)} WEKA sessions, token counts divided by {options.scale:g}"
    return Workload(
        source=traces if options.traces else generated,
        agents=len(trajectories),
        turns=measured_turns(trajectories),
        prompt_tokens=every.prompt_tokens - warm_tokens,
        append_tokens=every.append_tokens - warm_tokens,
        generate_tokens=every.generate_tokens - sum(one.rounds[0].generate_tokens for one in trajectories),
        max_context_tokens=every.max_context_tokens,
        warm_up=f"first turns ({warm_tokens:,} tokens) stored before the clock starts",
    )


def _renamed(session: Trajectory, identity: str) -> Trajectory:
    """The session under a name of its own, so that two agents with one session have tokens of their own."""
    rounds = tuple(
        msgspec.structs.replace(
            round_,
            subagents=tuple(
                _renamed(subagent, f"{identity}/{index}.{number}") for number, subagent in enumerate(round_.subagents)
            ),
        )
        for index, round_ in enumerate(session.rounds)
    )
    return Trajectory(id=identity, rounds=rounds)
