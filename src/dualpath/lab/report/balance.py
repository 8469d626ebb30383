"""How evenly work was spread over engines, window by window: bytes through storage NICs, attention over PEs.

A job's totals hide what happens while it runs: two engines that are idle in turn end up even. So time is cut into
windows, and in each the busiest engine is compared with the average. A summary weighs each window by its work:
``sum of the busiest / sum of the averages``.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from dualpath.results.file import Run, SnicSample
from dualpath.results.roles import readers
from dualpath.spec.topology import Topology

LEAST_SHARE = 0.2
"""A window with less than this share of the median window's work has no balance: the job starts, ends or pauses."""


class Windows(msgspec.Struct, frozen=True):
    """Equal spans of a run's time, from its start, with each engine's work in them."""

    width_s: float
    engines: list[str]
    work: NDArray[np.float64]
    """[engines, windows]: bytes, or pairs of tokens."""

    @property
    def ends_s(self) -> list[float]:
        return [(at + 1) * self.width_s for at in range(self.work.shape[1])]

    def of(self, engines: Sequence[str]) -> "Windows":
        """Returns the windows of some engines only."""
        return Windows(self.width_s, list(engines), self.work[[self.engines.index(name) for name in engines]])


class Balance(msgspec.Struct, frozen=True):
    """The busiest engine's work over the average."""

    max_over_avg: list[float | None]
    """Balance by window; None if next to nothing was done in it."""
    overall: float
    """Balance weighted by work; 1 if nothing was done."""


def snic_windows(samples: Sequence[SnicSample], width_s: float, at_most: int | None = None) -> Windows | None:
    """Returns the bytes that each NIC received, interpolated between samples. `at_most` widens windows to limit them.

    Returns None for fewer than two samples, or if no time passes.
    """
    if len(samples) < 2 or samples[-1].at_s <= samples[0].at_s:
        return None
    last_s = samples[-1].at_s
    width_s = min(width_s if at_most is None else max(width_s, last_s / at_most), last_s)
    edges_s = np.arange(int(last_s / width_s + 1e-9) + 1) * width_s
    at_s = [0.0, *(sample.at_s for sample in samples)]
    engines = sorted({name for sample in samples for name in sample.received_bytes}, key=prefill_first)
    received = [[0, *(sample.received_bytes.get(name, 0) for sample in samples)] for name in engines]
    return Windows(width_s, engines, np.array([np.diff(np.interp(edges_s, at_s, one)) for one in received]))


def snic_balance(run: Run, width_s: float, at_most: int | None = None) -> Balance | None:
    """Balance of bytes received from storage, over the NICs that the run's system may read with."""
    windows = snic_windows(run.snic_samples, width_s, at_most)
    engines = [] if windows is None else readers(run.system, windows.engines)
    return balance_of(windows.of(engines)) if windows is not None and engines else None


def attention_balance(run: Run, width_s: float) -> Balance | None:
    """Balance of attention in prefill over the PEs; None without timings, or with only one PE.

    A turn's attention is its new tokens times the tokens they attend to (hit tokens, and half of the new ones). It is
    spread evenly over the time from having everything read to the first token, on its PE.
    """
    timed = [(turn, turn.timings) for turn in run.turn_results if turn.timings is not None]
    idle_too = {f"PE{number}" for number in range(Topology.parse(run.topology).prefill_engines)}
    engines = sorted(idle_too | {timings.prefill_engine for _, timings in timed})
    if len(engines) < 2 or not timed:
        return None
    edges_s = np.arange(0.0, max(turn.start_s + turn.ttft_s for turn, _ in timed) + width_s, width_s)
    work = np.zeros((len(engines), len(edges_s) - 1))
    for turn, timings in timed:
        new_tokens = turn.prompt_tokens - turn.loaded_tokens
        pairs = new_tokens * (turn.loaded_tokens + new_tokens / 2)
        ends_s = turn.start_s + turn.ttft_s
        starts_s = ends_s - timings.prefill_s
        done = np.interp(edges_s, [starts_s, max(ends_s, starts_s + 1e-6)], [0.0, pairs])
        work[engines.index(timings.prefill_engine)] += np.diff(done)
    return balance_of(Windows(width_s, engines, work))


def balance_of(windows: Windows) -> Balance:
    """Returns max over average of every window, and over all windows that were not next to idle."""
    total = windows.work.sum(axis=0)
    busy = total > LEAST_SHARE * np.median(total[total > 0]) if (total > 0).any() else np.zeros(len(total), bool)
    most, average = windows.work.max(axis=0, initial=0.0), windows.work.mean(axis=0)
    ratios = [float(m / a) if b else None for m, a, b in zip(most, average, busy, strict=True)]
    return Balance(ratios, float(most[busy].sum() / average[busy].sum()) if busy.any() else 1.0)


def prefill_first(engine: str) -> tuple[bool, int, str]:
    """Sort key of engines: PE0, PE1, …, DE0, …"""
    digits = engine.lstrip("PDE")
    return (not engine.startswith("PE"), int(digits) if digits.isdecimal() else 0, engine)
