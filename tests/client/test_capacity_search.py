import asyncio
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.client.capacity import PRECISION, find_capacity


def search(limit, low, high):
    """Of a server that holds up to `limit`; also the rates that were probed."""
    rates = []

    async def probe(number, rate):
        assert number == len(rates)
        rates.append(rate)
        return types.SimpleNamespace(holds=rate <= limit, verdict="steady" if rate <= limit else "ttft")

    found, probes = asyncio.run(find_capacity(probe, low, high))
    assert len(probes) == len(rates)
    return found, rates


@given(st.floats(0.01, 100), st.floats(0.02, 5), st.floats(1.2, 500))
def test_the_limit_lies_between_what_held_and_what_did_not(limit, low, factor):
    found, rates = search(limit, low, low * factor)
    assert len(rates) == len(set(rates)) <= 15
    if found.holds_agents_per_s is not None:
        assert found.holds_agents_per_s <= limit and found.holds_agents_per_s in rates
    if found.fails_agents_per_s is not None:
        assert found.fails_agents_per_s > limit and found.fails_agents_per_s in rates
        assert found.ended_by == "ttft"
    if None not in (found.holds_agents_per_s, found.fails_agents_per_s):
        assert found.fails_agents_per_s / found.holds_agents_per_s <= 1 + PRECISION


def test_the_ends_of_the_range_are_probed_first_and_may_be_the_answer():
    found, rates = search(0.01, 0.1, 2)
    assert rates == [0.1] and found.holds_agents_per_s is None and found.fails_agents_per_s == 0.1
    found, rates = search(5, 0.1, 2)
    assert rates == [0.1, 2] and found.holds_agents_per_s == 2 and found.fails_agents_per_s is None
    assert found.ended_by is None


@pytest.mark.parametrize("wrong", [(0, 1), (2, 1), (1, 1), (-1, 1)])
def test_a_range_must_be_one(wrong):
    with pytest.raises(ValueError, match="a range of rates"):
        search(1, *wrong)
