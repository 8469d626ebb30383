"""Times of prefill and decode steps, as two straight lines through measured samples.

    prefill batch = fixed + sum over its chunks of (chunk + new tokens · token + pairs · pair)
    decode step   = fixed + requests · request + context tokens · context_token

A pair is a new token and a token it attends to. Both lines are fitted by least squares of the relative error with no
coefficient below zero. So more work never takes less time, and a sample counts equally whether it takes milliseconds or
minutes. Real engines bend (tiles, occupancy, experts); `Fit` says by how much the line misses.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

Tokens = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Nanoseconds = Annotated[float, msgspec.Meta(gt=0)]


class PrefillSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prefill batch of `items` equal chunks on one engine, all layers, with nothing to wait for."""

    cached_tokens: Tokens
    """Tokens per item whose KV is already there."""
    new_tokens: Count
    """Tokens per item that are computed."""
    items: Count = 1
    ns: Nanoseconds


class DecodeSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One decode step of `batch` sequences on one engine."""

    batch: Count
    context_tokens: Count
    """Context of each sequence."""
    ns: Nanoseconds


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Relative errors of a line at its own samples."""

    samples: int
    mean_error: float
    max_error: float


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The two lines. Nanoseconds, all layers of the model."""

    prefill_fixed_ns: float
    prefill_chunk_ns: float
    prefill_token_ns: float
    prefill_pair_ns: float
    decode_fixed_ns: float
    decode_request_ns: float
    decode_context_token_ns: float
    prefill_fit: Fit
    decode_fit: Fit

    def prefill_ns(self, cached_tokens: float, new_tokens: float, items: int = 1) -> float:
        """Time of one batch of `items` equal chunks."""
        return self.prefill_fixed_ns + items * self.chunk_ns(new_tokens, pairs(cached_tokens, new_tokens))

    def chunk_ns(self, new_tokens: float, chunk_pairs: float) -> float:
        """Time that a chunk adds to its batch."""
        return self.prefill_chunk_ns + new_tokens * self.prefill_token_ns + chunk_pairs * self.prefill_pair_ns

    def decode_ns(self, batch: float, context_tokens: float) -> float:
        """Time of one step of `batch` sequences of `context_tokens` each."""
        return self.decode_fixed_ns + batch * (self.decode_request_ns + context_tokens * self.decode_context_token_ns)


class MeasuredEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements that replace the roofline of a cluster's engines."""

    times: StepTimes
    request_ns: float = 0.0
    """Time of a request up to its first token, besides reads, steps and transfers."""
    copy_bytes_per_s: float | None = None
    """Rate between buffer and device; None: the compute NIC's."""

    def with_prefill(self, factor: float) -> "MeasuredEngine":
        """Returns the engine with `factor` times the prefill speed."""
        names = ("prefill_fixed_ns", "prefill_chunk_ns", "prefill_token_ns", "prefill_pair_ns")
        faster = {name: getattr(self.times, name) / factor for name in names}
        return msgspec.structs.replace(self, times=msgspec.structs.replace(self.times, **faster))


def fit_step_times(prefill: Sequence[PrefillSample], decode: Sequence[DecodeSample]) -> StepTimes:
    """Fits the lines to the samples, at least one of either kind.

    Effects that samples can't tell apart go to one coefficient: in prefill first to the token, then the batch, the pair
    and last the chunk; in decode first to the step, then the context token and last the request.
    """
    rows = [(s.items * s.new_tokens, 1, s.items * pairs(s.cached_tokens, s.new_tokens), s.items) for s in prefill]
    (token, fixed, pair, chunk), prefill_fit = _fit(rows, [sample.ns for sample in prefill])
    steps = [(1, s.batch * s.context_tokens, s.batch) for s in decode]
    (step, context_token, request), decode_fit = _fit(steps, [sample.ns for sample in decode])
    return StepTimes(
        prefill_fixed_ns=fixed,
        prefill_chunk_ns=chunk,
        prefill_token_ns=token,
        prefill_pair_ns=pair,
        decode_fixed_ns=step,
        decode_request_ns=request,
        decode_context_token_ns=context_token,
        prefill_fit=prefill_fit,
        decode_fit=decode_fit,
    )


def pairs(cached_tokens: float, new_tokens: float) -> float:
    """Counts pairs of a new token and one that it attends to, itself included."""
    return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) / 2


def _fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[list[float], Fit]:
    """Returns coefficients c ≥ 0 with ``rows · c ≈ values``; drops the most negative one until none is negative.

    Columns that depend on earlier ones get none.
    """
    measured = np.asarray(values, float)
    design = np.asarray(rows, float)
    relative = design / measured[:, None]
    scale = np.abs(relative).max(axis=0)
    kept: list[int] = []
    for column in range(design.shape[1]):
        if np.linalg.matrix_rank(relative[:, [*kept, column]] / scale[[*kept, column]], tol=1e-6) > len(kept):
            kept.append(column)
    solution: NDArray[np.float64] = np.zeros(design.shape[1])
    while kept:
        found, *_ = np.linalg.lstsq(relative[:, kept] / scale[kept], np.ones(len(measured)), rcond=None)
        if (found >= 0).all():
            solution[kept] = found / scale[kept]
            break
        del kept[int(np.argmin(found))]
    errors = np.abs(relative @ solution - 1)
    quality = Fit(samples=len(measured), mean_error=float(errors.mean()), max_error=float(errors.max()))
    return solution.tolist(), quality
