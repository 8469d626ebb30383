"""Records of a replay: one per turn, and the figures over all of them. Times in seconds, lengths in tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from dualpath.spec.cluster_setup import ServedCluster
from dualpath.spec.timings import Timings


class TurnResult(msgspec.Struct, frozen=True, kw_only=True):
    """An answered turn. Times count from the first try, as the agent sees them."""

    trajectory: str
    round_index: int
    tries: int
    start_s: float
    """When it was first sent, after the start of the replay."""
    ttft_s: float
    """Time to first token."""
    ttst_s: float | None
    """First to second token; None if only one was asked for."""
    tpot_s: float | None
    """Mean time per token after the first."""
    latency_s: float
    prompt_tokens: int
    loaded_tokens: int
    """Prompt tokens whose KV was read from storage instead of computed."""
    generated_tokens: int
    output_digest: str
    """Digest of the generated token ids; equal digests mean that two systems computed the same."""
    timings: Timings | None = None
    """The server's stages; None if it does not tell."""
    pacing_error_s: float | None = None
    """How much later than due it was first sent: the load generator's own share."""


class TurnFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that failed. Its trajectory ends there."""

    trajectory: str
    round_index: int
    tries: int
    message: str
    abandoned_rounds: int
    """Later rounds of the trajectory, which could not run."""


class Percentiles(msgspec.Struct, frozen=True):
    """Percentiles of a latency, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


def percentiles(values_s: Iterable[float]) -> Percentiles | None:
    """Interpolates linearly between samples; returns None for no samples."""
    samples = np.fromiter(values_s, dtype=np.float64)
    if not samples.size:
        return None
    p50_s, p90_s, p99_s = np.percentile(samples, [50, 90, 99]).tolist()
    return Percentiles(float(samples.mean()), p50_s, p90_s, p99_s)


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a replay: an interrupted and resumed one has several, others have one."""

    started_at: str
    """Start, UTC, ISO 8601."""
    wall_s: float
    turns: int
    """Turns answered in this part."""


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """A replay's measurements. The main figure of an offline rollout is the job completion time."""

    jct_s: float
    """From the start of all agents to the last answer. For a resumed replay the sum over its parts: not comparable."""
    turns: tuple[TurnResult, ...]
    failures: tuple[TurnFailure, ...]
    context: Literal["own", "filled"] = "own"
    """What stood for generated tokens in later prompts: ``own`` or ``filled`` (see `client.server`)."""
    server: str = ""
    """Kind of server: ``dualpath``, ``vllm``, ``sglang`` or ``other``."""
    model: str = ""
    reports_loaded: bool = True
    """Whether the server said how many prompt tokens it loaded; otherwise `loaded_tokens` is 0."""
    cluster: ServedCluster | None = None
    """The cluster that a DualPath server describes."""
    parts: tuple[Part, ...] = ()

    @property
    def retries(self) -> int:
        return sum(turn.tries - 1 for turn in self.turns) + sum(turn.tries - 1 for turn in self.failures)

    @property
    def hit_rate(self) -> float:
        """Loaded over prompt tokens; 0 if no turn was answered."""
        prompt_tokens = sum(turn.prompt_tokens for turn in self.turns)
        return sum(turn.loaded_tokens for turn in self.turns) / prompt_tokens if prompt_tokens else 0.0

    @property
    def ttft(self) -> Percentiles | None:
        return percentiles(turn.ttft_s for turn in self.turns)

    @property
    def ttst(self) -> Percentiles | None:
        return percentiles(turn.ttst_s for turn in self.turns if turn.ttst_s is not None)

    @property
    def tpot(self) -> Percentiles | None:
        return percentiles(turn.tpot_s for turn in self.turns if turn.tpot_s is not None)

    @property
    def latency(self) -> Percentiles | None:
        return percentiles(turn.latency_s for turn in self.turns)

    @property
    def start_pacing(self) -> Percentiles | None:
        """Pacing errors of first turns: agents that start at once still go out one after another."""
        return percentiles(t.pacing_error_s for t in self.turns if t.pacing_error_s is not None and not t.round_index)

    @property
    def pacing(self) -> Percentiles | None:
        """Pacing errors of all later turns."""
        return percentiles(t.pacing_error_s for t in self.turns if t.pacing_error_s is not None and t.round_index)

    def figures(self) -> dict[str, Any]:
        """Returns the flat figures of a result file's run: latencies, hit rate, turns, retries and errors."""
        latencies = {"ttft": self.ttft, "ttst": self.ttst, "tpot": self.tpot}
        return {
            **{f"{name}_p50_s": None if found is None else found.p50_s for name, found in latencies.items()},
            **{f"{name}_p99_s": None if found is None else found.p99_s for name, found in latencies.items()},
            "hit_rate": self.hit_rate,
            "turns": len(self.turns),
            "retries": self.retries,
            "errors": sum(1 + failure.abandoned_rounds for failure in self.failures),
            "error_messages": [f"{f.trajectory}, turn {f.round_index}: {f.message}" for f in self.failures[:10]],
        }


STAGES = {
    "outside": "the way to the server and back, and earlier tries",
    "scheduling": "until a PE and a DE were chosen",
    "allocation": "until both had room",
    "read": "until the hit tokens had come from storage",
    "prefill": "waiting for the batch, computing, moving KV to the DE",
    "decode": "from the first token to the last",
}
"""Stages of a turn, in order. `outside` is what the client saw beyond the server's stages."""
TTFT_STAGES = tuple(stage for stage in STAGES if stage != "decode")


def stages_of(turn: TurnResult) -> dict[str, float]:
    """Returns seconds by stage, in the order of `STAGES`; they add up to the turn's latency, as far as clocks agree.

    Without timings there are two stages: `prefill` until the first token, then `decode`.
    """
    decode_s = max(0.0, turn.latency_s - turn.ttft_s)
    timings = turn.timings
    if timings is None:
        return dict.fromkeys(STAGES, 0.0) | {"prefill": turn.ttft_s, "decode": decode_s}
    told = {
        "scheduling": timings.scheduling_s,
        "allocation": timings.allocation_s,
        "read": timings.read_s,
        "prefill": timings.prefill_s,
    }
    return {"outside": max(0.0, turn.ttft_s - sum(told.values())), **told, "decode": decode_s}


def mean_stages_s(turns: Sequence[TurnResult]) -> dict[str, float] | None:
    """Returns mean seconds by stage before the first token over the turns with timings; None if none has any."""
    told = [stages_of(turn) for turn in turns if turn.timings is not None]
    return {stage: sum(one[stage] for one in told) / len(told) for stage in TTFT_STAGES} if told else None
