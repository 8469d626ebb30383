"""The agents of a replay: generated, or recorded ones."""

from dualpath.lab.replay.settings import OFFLINE_AGENTS, ONLINE_AGENTS, ReplaySettings
from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import Source, load_source

GENERATED_TURNS = 4


def source_of(settings: ReplaySettings) -> Source:
    """Raises TraceError and ValueError."""
    if settings.traces:
        limits = TraceLimits(
            scale=settings.scale, max_context_tokens=settings.max_context_tokens, max_turns=settings.turns
        )
        source = load_source(
            settings.traces, limits, agents=settings.agents, seed=settings.seed, tokenizer=settings.tokenizer
        )
        return Source(trajectories=source.agents(settings.agents), description=source.description)
    if settings.scale != 1 or settings.max_context_tokens is not None or settings.tokenizer is not None:
        raise ValueError("--scale, --max-context and --tokenizer are about traces: give --trace")
    mix = AgentMix(
        turns=settings.turns or GENERATED_TURNS,
        first_context_tokens=settings.first_context_tokens,
        append_tokens=settings.append_tokens,
        generate_tokens=settings.generate_tokens,
        gap_s=settings.gap_s,
    )
    count = settings.agents or (ONLINE_AGENTS if settings.online else OFFLINE_AGENTS)
    return Source(
        trajectories=generate_trajectories(mix, count, settings.seed), description=f"generated, seed {settings.seed}"
    )
