"""When agents start: Poisson arrivals. Integer nanoseconds, seeded."""

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
