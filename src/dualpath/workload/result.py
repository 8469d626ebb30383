"""What a replay measured: a record per turn, and the figures over all of them. Times in seconds, lengths in tokens."""

from collections.abc import Iterable

import msgspec
import numpy as np


class TurnResult(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that was answered. Times count from the first try, as the agent sees them."""

    trajectory: str
    round_index: int
    tries: int
    start_s: float
    """When it was first sent, from the start of the replay."""
    ttft_s: float
    """Time to first token."""
    ttst_s: float | None
    """First to second token; None where only one was asked for."""
    tpot_s: float | None
    """Mean time per token after the first."""
    latency_s: float
    prompt_tokens: int
    loaded_tokens: int
    """Prompt tokens whose KV was read from storage instead of computed."""
    generated_tokens: int
    output_digest: str
    """Of the generated token ids: two systems that agree computed the same."""


class TurnFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A turn that was not answered. Its trajectory ends there."""

    trajectory: str
    round_index: int
    tries: int
    message: str
    abandoned_rounds: int
    """Rounds of the trajectory that could not be run after it."""


class Percentiles(msgspec.Struct, frozen=True):
    """Of a latency, in seconds."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float


def percentiles(values_s: Iterable[float]) -> Percentiles | None:
    """Linear interpolation between samples; None for no samples."""
    samples = np.fromiter(values_s, dtype=np.float64)
    if not samples.size:
        return None
    p50_s, p90_s, p99_s = np.percentile(samples, [50, 90, 99]).tolist()
    return Percentiles(float(samples.mean()), p50_s, p90_s, p99_s)


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """A replay: offline rollout, so the job completion time is its main figure."""

    jct_s: float
    """From the start of all agents to the last answer."""
    turns: tuple[TurnResult, ...]
    failures: tuple[TurnFailure, ...]

    @property
    def retries(self) -> int:
        return sum(turn.tries - 1 for turn in self.turns) + sum(turn.tries - 1 for turn in self.failures)

    @property
    def hit_rate(self) -> float:
        """Loaded over prompt tokens; 0 where no turn was answered."""
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
