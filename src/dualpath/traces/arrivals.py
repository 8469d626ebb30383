"""When agents start and how long they pause: Poisson arrivals, think and tool time. Integer nanoseconds, seeded."""

import math

import numpy as np
import numpy.typing as npt

Nanoseconds = npt.NDArray[np.int64]


def poisson_arrivals_ns(agents_per_s: float, count: int, seed: int = 0) -> Nanoseconds:
    """Returns the start times of `count` agents, in order; `agents_per_s` (the paper's APS) arrive on average.

    A larger `count` leaves the first times unchanged. Raises ValueError for a rate or a count not above zero.
    """
    if not (0 < agents_per_s < math.inf) or count < 1:
        raise ValueError(f"the rate and the number of agents must be above zero, not {agents_per_s} and {count}")
    gaps = np.random.default_rng([seed, 1]).standard_exponential(count)
    return np.rint(np.cumsum(gaps) / agents_per_s * 1e9).astype(np.int64)


def pauses_ns(mean_s: float, count: int, spread: float = 1.0, seed: int = 0) -> Nanoseconds:
    """Draws `count` pauses from a gamma distribution; `spread` is standard deviation over mean, 0 makes them constant.

    Pass them to `TurnTable.with_gaps`. Raises ValueError for a mean or a spread below zero.
    """
    if not (0 <= mean_s < math.inf and 0 <= spread < math.inf):
        raise ValueError(f"mean_s and spread must be numbers from 0 up, not {mean_s} and {spread}")
    if mean_s == 0 or spread == 0:
        return np.full(count, round(mean_s * 1e9), np.int64)
    draws = np.random.default_rng([seed, 2]).gamma(1 / spread**2, mean_s * spread**2, size=count)
    return np.rint(draws * 1e9).astype(np.int64)
