"""Fits of a few non-negative coefficients to samples, by least squares of the relative error."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dualpath.prediction.machine import Fit


def fit(
    rows: Sequence[Sequence[float]], values: Sequence[float], known: Sequence[float] | None = None
) -> tuple[list[float], Fit]:
    """Coefficients c ≥ 0 with ``rows · c + known ≈ values``, and how well they do.

    A coefficient that would be negative is left out, the most negative first. Raises ValueError for fewer samples than
    coefficients, or a value that is not above zero.
    """
    design, measured = np.asarray(rows, float), np.asarray(values, float)
    given = np.zeros(len(measured)) if known is None else np.asarray(known, float)
    if len(measured) < design.shape[1] or not (measured > 0).all():
        raise ValueError(f"{len(measured)} samples, the least {measured.min()}, for {design.shape[1]} coefficients")
    coefficients = _solve(design / measured[:, None], 1 - given / measured)
    errors = np.abs((design @ coefficients + given) / measured - 1)
    return coefficients.tolist(), Fit(
        samples=len(measured), mean_error=float(errors.mean()), max_error=float(errors.max())
    )


def _solve(relative: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    kept = list(range(relative.shape[1]))
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    solution = np.zeros(relative.shape[1])
    while kept:
        found, *_ = np.linalg.lstsq(relative[:, kept] / scale[kept], targets, rcond=None)
        if (found >= 0).all():
            solution[kept] = found / scale[kept]
            break
        del kept[int(np.argmin(found))]
    return solution
