"""Poisson arrivals: means, spread, order, seeds, refusals."""

import numpy as np
import pytest

from dualpath.traces.arrivals import poisson_arrivals_ns


def test_gaps_between_arrivals_are_exponential_with_the_given_rate():
    arrivals = poisson_arrivals_ns(0.4, 20_000, seed=1)
    gaps_s = np.diff(arrivals) / 1e9
    assert (gaps_s >= 0).all()
    assert gaps_s.mean() == pytest.approx(2.5, rel=0.03)
    assert gaps_s.std() == pytest.approx(2.5, rel=0.03)
    assert (gaps_s > 2.5).mean() == pytest.approx(np.exp(-1), rel=0.03)


def test_more_arrivals_and_faster_ones_keep_the_pattern():
    few, many, fast = poisson_arrivals_ns(1, 10), poisson_arrivals_ns(1, 50), poisson_arrivals_ns(2, 10)
    assert np.array_equal(few, many[:10])
    assert np.abs(few - 2 * fast).max() <= 2


@pytest.mark.parametrize(("rate", "count"), [(0, 5), (-1, 5), (float("inf"), 5), (1, 0)])
def test_impossible_arrivals_are_refused(rate, count):
    with pytest.raises(ValueError, match="must be above zero"):
        poisson_arrivals_ns(rate, count)
