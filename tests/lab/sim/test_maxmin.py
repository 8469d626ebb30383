"""Max-min sharing: by hand, and against its definition on random networks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.sim.events import Events
from dualpath.lab.sim.maxmin import SharedLinks

GB = 1e9


def started(
    rates: "list[float]", flows: "list[tuple[tuple[int, ...], TrafficClass]]"
) -> "tuple[SharedLinks, list[float]]":
    links = SharedLinks(Events(), rates)
    for crossed, kind in flows:
        links.start(crossed, 1e12, lambda _: None, kind=kind)
    return links, list(links.rates().values())


def test_the_textbook_case() -> None:
    # Two flows share link 0, one of them goes on over link 1, whose other flow gets what is left.
    low = TrafficClass.LOW
    _, rates = started([10 * GB, 8 * GB], [((0,), low), ((0, 1), low), ((1,), low)])
    assert rates == pytest.approx([6 * GB, 4 * GB, 4 * GB])


def test_high_class_has_its_share_and_low_is_not_starved() -> None:
    _, rates = started([10 * GB], [((0,), TrafficClass.HIGH), ((0,), TrafficClass.LOW)])
    assert rates == pytest.approx([9.9 * GB, 0.1 * GB])
    _, rates = started([10 * GB], [((0,), TrafficClass.LOW)])
    assert rates == pytest.approx([10 * GB])


def test_what_low_can_not_use_goes_back_to_high() -> None:
    _, rates = started([10 * GB, 0.01 * GB], [((0,), TrafficClass.HIGH), ((0, 1), TrafficClass.LOW)])
    assert rates == pytest.approx([9.99 * GB, 0.01 * GB])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.floats(0.1, 100.0), min_size=1, max_size=5).flatmap(
        lambda rates: st.tuples(
            st.just([rate * GB for rate in rates]),
            st.lists(
                st.tuples(
                    st.lists(st.integers(0, len(rates) - 1), min_size=1, max_size=3).map(tuple),
                    st.sampled_from(TrafficClass),
                ),
                min_size=1,
                max_size=8,
            ),
        )
    )
)
def test_every_flow_has_a_bottleneck(network: "tuple[list[float], list[tuple[tuple[int, ...], TrafficClass]]]") -> None:
    """Feasible, work conserving and max-min: a flow's rate is the largest of its class on some full link it uses."""
    capacities, flows = network
    _, rates = started(capacities, flows)
    used = [0.0] * len(capacities)
    for (crossed, _), rate in zip(flows, rates, strict=True):
        for link in set(crossed):
            used[link] += rate
    assert all(total <= capacity * (1 + 1e-9) for total, capacity in zip(used, capacities, strict=True))
    for (crossed, kind), rate in zip(flows, rates, strict=True):
        assert rate > 0
        full = [link for link in set(crossed) if used[link] >= capacities[link] * (1 - 1e-6)]
        assert full, "a flow that nothing holds back"
        if kind is TrafficClass.LOW:
            assert any(
                all(
                    rate >= other * (1 - 1e-6)
                    for (others, other_kind), other in zip(flows, rates, strict=True)
                    if link in others and other_kind is TrafficClass.LOW
                )
                for link in full
            )


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5_000), st.integers(1, 10**7), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(0, 5_000),
)
def test_all_bytes_arrive(flows: "list[tuple[int, int, int]]", slowed_at_us: int) -> None:
    events = Events()
    links = SharedLinks(events, [3 * GB, 2 * GB])
    arrived: list[int] = []
    for at_us, n_bytes, over in flows:
        crossed = ((0,), (1,), (0, 1), (1, 0))[over]
        events.at(at_us * 1000, lambda a: links.start(a[0], a[1], arrived.append, a[1]), (crossed, n_bytes))
    events.at(slowed_at_us * 1000, lambda _: links.set_rate(0, GB))
    while len(events):
        events.step()
    assert sorted(arrived) == sorted(n_bytes for _, n_bytes, _ in flows)
    expected = [sum(n for _, n, over in flows if over != 1), sum(n for _, n, over in flows if over != 0)]
    assert links.moved_bytes == pytest.approx(expected, rel=1e-9, abs=1e-3)


def test_one_flow_takes_its_time() -> None:
    events = Events()
    links = SharedLinks(events, [2 * GB])
    ended: list[int] = []
    links.start([0], 4e6, lambda _: ended.append(events.now))
    links.start([0], 2e6, lambda _: ended.append(events.now))
    while len(events):
        events.step()
    assert ended == [2_000_000, 3_000_000]


@pytest.mark.parametrize("rates", [[], [1.0, 0.0]])
def test_rates_must_be_above_zero(rates: "list[float]") -> None:
    with pytest.raises(ValueError, match="above zero"):
        SharedLinks(Events(), rates)
