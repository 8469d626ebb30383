"""The bottleneck-free range against a brute-force count of bytes: every pair of engines, every hop, every link."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.lab.facts.bottleneck import bottleneck_free
from dualpath.lab.facts.cluster_files import load_cluster, preset_names

PAPER_NODE = {"engines_per_node": 8, "snic_ratio": 1, "cnic_bytes_per_s": 50e9, "dram_bytes_per_s": 500e9}


def count_bytes(prefill_nodes, decode_nodes, g, snic):
    """Bytes a second on each link when every node reads `snic`, counted by walking each byte's path. Exact."""
    links = Counter()
    pes = [(node, gpu) for node in range(prefill_nodes) for gpu in range(g)]
    des = [(node, gpu) for node in range(decode_nodes) for gpu in range(g)]

    def dma(nic, reads_dram, writes_dram, n_bytes, to=None):
        """`nic` reads memory and `to` (itself: a local copy) writes it; DRAM counts where it is touched."""
        to = to or nic
        links["cnic read", *nic] += n_bytes
        links["cnic write", *to] += n_bytes
        if reads_dram:
            links["dram", *nic[:2]] += n_bytes
        if writes_dram:
            links["dram", *to[:2]] += n_bytes

    for pe in pes:
        for de in des:
            by_pe, by_de = Fraction(snic) / (g * len(des)), Fraction(snic) / (g * len(pes))
            pe_nic, de_nic = ("PE", *pe), ("DE", *de)
            links["snic", *pe_nic[:2]] += by_pe
            links["dram", *pe_nic[:2]] += by_pe
            dma(pe_nic, True, False, by_pe)
            dma(pe_nic, False, True, by_pe, to=de_nic)
            dma(de_nic, True, False, by_pe)
            links["snic", *de_nic[:2]] += by_de
            links["dram", *de_nic[:2]] += by_de
            dma(de_nic, True, False, by_de, to=pe_nic)
            dma(de_nic, True, False, by_de)
    return links


def worst(links, kind, role):
    return max(n_bytes for (what, side, *_), n_bytes in links.items() if (what, side) == (kind, role))


NODES = st.tuples(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(5, 20),
    st.integers(10, 400),
)


@settings(deadline=None, derandomize=True)
@given(NODES)
def test_every_utilisation_equals_the_flow_count(node):
    prefill_nodes, decode_nodes, g, snic, cnic, dram = node
    links = count_bytes(prefill_nodes, decode_nodes, g, snic)
    found = bottleneck_free(prefill_nodes, decode_nodes, g, snic / cnic, cnic, dram)
    for load in found.loads:
        role, kind, *direction = load.link.split()
        counted = worst(links, " ".join([kind.lower(), *direction]), role)
        rate = dram if kind == "DRAM" else cnic
        assert load.bytes_per_s == pytest.approx(float(counted)), load.link
        assert load.utilisation == pytest.approx(float(counted) / rate), load.link
    assert all(worst(links, "snic", role) == snic for role in ("PE", "DE"))


@settings(deadline=None, derandomize=True)
@given(NODES)
def test_the_range_holds_exactly_the_ratios_at_which_no_link_is_full(node):
    prefill_nodes, decode_nodes, g, snic, cnic, dram = node
    links = count_bytes(prefill_nodes, decode_nodes, g, snic)
    fits = all(n_bytes <= {"snic": snic, "dram": dram}.get(link[0], cnic) for link, n_bytes in links.items())
    found = bottleneck_free(prefill_nodes, decode_nodes, g, snic / cnic, cnic, dram)
    ratio = prefill_nodes / decode_nodes
    inside = found.least_ratio * (1 - 1e-9) <= ratio <= found.most_ratio * (1 + 1e-9)
    assert fits == inside == found.is_free


@settings(deadline=None, derandomize=True)
@given(NODES)
def test_the_named_links_are_the_ones_that_give_out(node):
    _, _, g, snic, cnic, dram = node

    def at(ratio):
        found = bottleneck_free(ratio, 1, g, snic / cnic, cnic, dram)
        return {load.link: load.utilisation for load in found.loads}, found

    _, found = at(1)
    if 0 < found.least_ratio < math.inf:
        assert at(found.least_ratio * 0.99)[0][found.least_link] > 1
        assert at(found.least_ratio)[0][found.least_link] == pytest.approx(1)
    if 0 < found.most_ratio < math.inf:
        assert at(found.most_ratio * 1.01)[0][found.most_link] > 1
        assert at(found.most_ratio)[0][found.most_link] == pytest.approx(1)
    if found.most_ratio <= 0:
        assert found.is_empty or found.least_ratio == 0
        assert at(1e-6)[0][found.most_link] > 1


def test_the_papers_node():
    found = bottleneck_free(2, 4, **PAPER_NODE)
    assert (found.least_ratio, found.most_ratio) == (pytest.approx(1 / 7), pytest.approx(7 / 2))
    assert found.least_link == "PE CNIC write"
    # DE CNIC write and DE DRAM both bind at 7/2 on this node: (g − s)/2s = (M/Bs − 3)/2.
    assert found.most_link in {"DE CNIC write", "DE DRAM"}
    assert found.is_free and found.snic_share == 1
    assert (found.binding.link, found.binding.utilisation) == ("DE DRAM", pytest.approx(0.4))


def test_by_how_much_a_ratio_outside_is_too_high():
    found = bottleneck_free(7, 1, **PAPER_NODE)
    assert not found.is_free
    assert (found.binding.link, found.binding.utilisation) == ("DE CNIC write", pytest.approx(15 / 8))
    assert found.snic_share == pytest.approx(8 / 15)


def test_a_snic_too_fast_for_the_compute_nics_leaves_no_range():
    found = bottleneck_free(1, 1, 2, 2, 50e9, 500e9)
    assert found.is_empty and not found.is_free


@pytest.mark.parametrize("name", preset_names())
def test_the_papers_clusters_are_inside(name):
    cluster = load_cluster(name)
    assert bottleneck_free(cluster.prefill_nodes, cluster.decode_nodes, **PAPER_NODE).is_free


@pytest.mark.parametrize("position", range(6))
def test_nothing_may_be_zero(position):
    given_values = [1, 1, 8, 1, 50e9, 500e9]
    given_values[position] = 0
    with pytest.raises(ValueError, match="above zero"):
        bottleneck_free(*given_values)
