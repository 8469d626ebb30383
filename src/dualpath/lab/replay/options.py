"""The options of a replay, and the agents that follow from them."""

from pathlib import Path

import msgspec

from dualpath.client.rollout import ReplayOptions
from dualpath.client.server import ServerKind
from dualpath.results.online import Slo
from dualpath.traces.generate import AgentMix, generate_trajectories
from dualpath.traces.limits import TraceLimits
from dualpath.traces.sources import Source, load_source

OFFLINE_AGENTS, ONLINE_AGENTS = 12, 500
"""Default numbers of generated agents: all at once, and different ones among those that arrive (paper §9)."""
GENERATED_TURNS = 4
WINDOWS = 12
"""Windows per measurement, by default."""


class ReplayRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The options. Raises ValueError naming the option that is wrong."""

    url: str
    traces: tuple[str, ...] = ()
    """Sources for `dualpath.traces.sources`; empty: generated agents."""
    agents: int | None = None
    """Agents at once, or different ones among those that arrive. None: one per recording."""
    turns: int | None = None
    """Mean turns of generated agents (4); at most that many of recorded ones."""
    first_context_tokens: float = 2800
    append_tokens: float = 64
    generate_tokens: float = 16
    gap_s: float = 0.0
    """Mean pause of generated agents."""
    scale: float = 1.0
    max_context_tokens: int | None = None
    tokenizer: Path | None = None
    seed: int = 0
    token_ids_below: int = 256
    agents_per_s: float | None = None
    find_agents_per_s: tuple[float, float] | None = None
    duration_s: float = 120.0
    """Length of a measurement; longest length of a probe."""
    window_s: float | None = None
    slo: Slo = Slo()
    gap_scale: float | None = None
    """Factor on pauses. None: 1 if agents arrive, 0 if all start at once (paper §9)."""
    server: ServerKind | None = None
    api_key: str | None = None
    retries: int = 2
    turn_timeout_s: float = 300.0
    out: Path = Path("results")
    """Directory of ``replay.json`` and ``turns.jsonl``."""
    resume: bool = False
    command: str = "dualpath replay"
    """The command as typed; kept in the result file."""

    def __post_init__(self) -> None:
        if self.agents_per_s is not None and self.find_agents_per_s is not None:
            raise ValueError("--aps replays at one rate and --find-aps searches for one: give only one of them")
        if self.resume and self.online:
            raise ValueError(
                "--resume continues agents that all started at once; with --aps or --find-aps the time of every "
                "arrival counts, so start again without it"
            )
        if self.window_s is not None and self.window_s > self.duration_s:
            raise ValueError(f"--window ({self.window_s:g} s) is longer than --duration ({self.duration_s:g} s)")

    @property
    def online(self) -> bool:
        return self.agents_per_s is not None or self.find_agents_per_s is not None

    @property
    def journal(self) -> Path:
        return self.out / "turns.jsonl"

    def client_options(self) -> ReplayOptions:
        """Makes the client's options. Raises ValueError."""
        return ReplayOptions(
            seed=self.seed,
            token_ids_below=self.token_ids_below,
            retries=self.retries,
            turn_timeout_s=self.turn_timeout_s,
            gap_scale=float(self.online) if self.gap_scale is None else self.gap_scale,
            api_key=self.api_key,
            server=self.server,
        )


def source_of(request: ReplayRequest) -> Source:
    """Returns the agents, generated or recorded. Raises TraceError and ValueError."""
    if request.traces:
        limits = TraceLimits(
            scale=request.scale, max_context_tokens=request.max_context_tokens, max_turns=request.turns
        )
        source = load_source(
            request.traces, limits, agents=request.agents, seed=request.seed, tokenizer=request.tokenizer
        )
        return Source(trajectories=source.agents(request.agents), description=source.description)
    if request.scale != 1 or request.max_context_tokens is not None or request.tokenizer is not None:
        raise ValueError("--scale, --max-context and --tokenizer only apply to traces: give --trace")
    mix = AgentMix(
        turns=request.turns or GENERATED_TURNS,
        first_context_tokens=request.first_context_tokens,
        append_tokens=request.append_tokens,
        generate_tokens=request.generate_tokens,
        gap_s=request.gap_s,
    )
    count = request.agents or (ONLINE_AGENTS if request.online else OFFLINE_AGENTS)
    made = generate_trajectories(mix, count, request.seed)
    return Source(trajectories=made, description=f"generated, seed {request.seed}")
