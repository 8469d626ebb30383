"""Topologies: what is written is what is read, alike or mixed, with rates."""

import pickle

import pytest

from dualpath.spec.topology import NodeGroup, Topology
from dualpath.spec.units import parse_rates


@pytest.mark.parametrize("text", ["1P1D", "2P4D", "1P2Dx4", "1Px4+2Dx2", "1Px2+1Px4+2D", "2P+1Px8+3Dx2+1D", "1P+1P+1D"])
def test_a_topology_is_what_it_is_written_as(text: str) -> None:
    topology = Topology.parse(text)
    assert str(topology) == text
    assert Topology.parse(str(topology)) == topology == pickle.loads(pickle.dumps(topology))
    assert hash(topology) == hash(Topology.parse(text.lower()))


@pytest.mark.parametrize(("text", "alike"), [(" 2p4D ", Topology(2, 4)), ("1Px4 + 2Dx4", Topology(1, 2, 4))])
def test_nodes_that_are_alike_have_one_text(text: str, alike: Topology) -> None:
    assert Topology.parse(text) == alike
    assert "+" not in str(alike)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1P",
        "0P1D",
        "1P0D",
        "P1D",
        "1p-1d",
        "1P1D1",
        "1D+1P",
        "1P+",
        "1P2Dx2+1D",
        "1P+1Dx0",
        "1P+1D+1P",
        "9" * 5000 + "P1D",
    ],
)
def test_what_is_no_topology_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a topology"):
        Topology.parse(text)


def test_nodes_of_different_sizes_are_counted() -> None:
    mixed = Topology.parse("1Px2+1Px4+2D")
    assert mixed.groups == (NodeGroup("P", 1, 2), NodeGroup("P", 1, 4), NodeGroup("D", 2))
    assert (mixed.sizes, mixed.nodes, mixed.engines) == ([2, 4, 1, 1], 4, 8)
    assert (mixed.prefill_nodes, mixed.decode_nodes, mixed.prefill_engines, mixed.decode_engines) == (2, 2, 6, 2)


@pytest.mark.parametrize(
    ("text", "rates", "by_node", "pooled"),
    [
        ("1P2Dx4", "unlimited", [None, None, None], 3.0),
        ("1Px4+2D", "10B/s", [10, 10, 10], 3.0),
        ("1P2D", "20B/s+10B/s", [20, 10, 10], 2.0),
        ("1P+1P+1Dx2", "30B/s+10B/s+40B/s", [30, 10, 40], 2.0),
    ],
)
def test_rates_are_of_all_nodes_or_of_each_group(
    text: str, rates: str, by_node: list[int | None], pooled: float
) -> None:
    topology = Topology.parse(text)
    assert topology.by_node(parse_rates(rates)) == by_node
    assert topology.pooled(parse_rates(rates)) == pooled


def test_rates_that_fit_no_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rates for 1P2D, which has 2 groups"):
        Topology(1, 2).by_node((1, 2, 3))
    with pytest.raises(ValueError, match="either all nodes are unlimited"):
        parse_rates("10MB/s+unlimited")
