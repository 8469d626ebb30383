"""The agents of a demo: generated ones, or recorded sessions, the same for every system."""

from dualpath.lab.experiments.agents import recorded_agents
from dualpath.lab.experiments.assemble import measured_turns
from dualpath.lab.experiments.demo.options import DemoOptions
from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.limits import TraceLimits
from dualpath.traces.trajectory import Trajectory

DEFAULT_AGENTS = 12


def build_trajectories(options: DemoOptions) -> list[Trajectory]:
    """Each has a first round to warm up with and at most `options.turns` more. Raises TraceError, ValueError."""
    trajectories = _trajectories(options)
    if measured_turns(trajectories) == 0:
        raise ValueError("nothing to measure: no agent has a turn after its first; raise --max-context or --scale")
    return trajectories


def source(options: DemoOptions) -> str:
    """Where the agents come from, in words."""
    if options.traces:
        return f"{len(options.traces)} WEKA sessions, token counts divided by {options.scale:g}"
    return f"generated, seed {options.seed}"


def _trajectories(options: DemoOptions) -> list[Trajectory]:
    if not options.traces:
        mix = AgentMix(
            turns=1 + options.turns,
            first_context_tokens=options.first_context_tokens,
            append_tokens=options.append_tokens,
            generate_tokens=options.generate_tokens,
        )
        return generate_trajectories(mix, options.agents or DEFAULT_AGENTS, options.seed)
    limits = TraceLimits(
        scale=options.scale, max_context_tokens=options.max_context_tokens, max_turns=1 + options.turns
    )
    return recorded_agents(options.traces, limits, options.agents)
