"""Poisson arrivals and pauses: means, spread, order, seeds, refusals."""

import numpy as np
import pytest

from dualpath.traces.arrivals import pauses_ns, poisson_arrivals_ns


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


def test_pauses_have_the_mean_and_the_spread():
    pauses_s = pauses_ns(3.0, 50_000, spread=0.5, seed=2) / 1e9
    assert pauses_s.mean() == pytest.approx(3, rel=0.02)
    assert pauses_s.std() == pytest.approx(1.5, rel=0.02)
    assert pauses_ns(3.0, 3, spread=0).tolist() == [3_000_000_000] * 3
    assert pauses_ns(0, 2).tolist() == [0, 0]


@pytest.mark.parametrize(("rate", "count"), [(0, 5), (-1, 5), (float("inf"), 5), (1, 0)])
def test_impossible_arrivals_are_refused(rate, count):
    with pytest.raises(ValueError, match="must be above zero"):
        poisson_arrivals_ns(rate, count)


def test_impossible_pauses_are_refused():
    with pytest.raises(ValueError, match="from 0 up"):
        pauses_ns(-1, 5)
