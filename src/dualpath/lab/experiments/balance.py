"""How evenly work was spread over engines, window by window: bytes through storage NICs, attention over PEs.

A job's totals hide what happens while it runs: two engines that take turns at being idle end up even. So time is cut
into windows, and in each the busiest engine is set against the average. A summary over windows weighs each by its work:
``sum of the busiest / sum of the averages``.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from dualpath.lab.report.balance import readers
from dualpath.results.file import Run

WINDOW_S = 2.0
LEAST_SHARE = 0.2
"""A window with less than this share of the median window's work is the start or the end of the job: left out."""

Matrix = npt.NDArray[np.float64]
"""Rows are engines, columns windows."""


class Balance(msgspec.Struct, frozen=True):
    """Max over average per window."""

    ends_s: list[float]
    max_over_avg: list[float]
    overall: float
    """Weighted by work; 1 where nothing was done."""


def snic_balance(run: Run, window_s: float = WINDOW_S) -> Balance | None:
    """Of bytes received from storage, over the engines that the system may read with; None without samples."""
    engines = readers(run.system, list(run.snic_bytes))
    if len(run.snic_samples) < 2 or not engines:
        return None
    edges = np.arange(0.0, run.snic_samples[-1].at_s, window_s)
    at_s = [0.0, *(sample.at_s for sample in run.snic_samples)]
    received = [[0, *(sample.received_bytes.get(engine, 0) for sample in run.snic_samples)] for engine in engines]
    return _balance(np.array([np.diff(np.interp(edges, at_s, one)) for one in received]), edges[1:])


def attention_balance(run: Run, window_s: float = WINDOW_S) -> Balance | None:
    """Of attention in prefill, over the PEs; None where the server told no timings or there is one PE.

    A turn's attention is its new tokens times the tokens they attend to (hit tokens, and half of the new ones), and is
    spread evenly over the time its PE took from having everything read to the first token.
    """
    engines = sorted(engine for engine in run.snic_bytes if engine.startswith("PE"))
    timed = [(turn, turn.timings) for turn in run.turn_results if turn.timings is not None]
    if len(engines) < 2 or not timed:
        return None
    edges = np.arange(0.0, max(turn.start_s + turn.ttft_s for turn, _ in timed) + window_s, window_s)
    work = np.zeros((len(engines), len(edges) - 1))
    for turn, timings in timed:
        new_tokens = turn.prompt_tokens - turn.loaded_tokens
        pairs = new_tokens * (turn.loaded_tokens + new_tokens / 2)
        ends_s = turn.start_s + turn.ttft_s
        starts_s = ends_s - timings.prefill_s
        done = np.interp(edges, [starts_s, max(ends_s, starts_s + 1e-6)], [0.0, pairs])
        work[engines.index(timings.prefill_engine)] += np.diff(done)
    return _balance(work, edges[1:])


def _balance(work: Matrix, ends_s: npt.NDArray[np.float64]) -> Balance:
    total = work.sum(axis=0)
    busy = total > LEAST_SHARE * np.median(total[total > 0]) if (total > 0).any() else np.zeros(len(total), bool)
    most, average = work[:, busy].max(axis=0, initial=0.0), work[:, busy].mean(axis=0)
    overall = float(most.sum() / average.sum()) if busy.any() else 1.0
    return Balance(ends_s[busy].tolist(), (most / average).tolist() if busy.any() else [], overall)
