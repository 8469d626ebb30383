"""A cluster's settings refuse what can't be, by name, also from Python."""

import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.core.vocabulary import Role
from dualpath.spec.kv_bytes import KVBytes
from dualpath.spec.topology import Topology


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("quota_ns", -1),
        ("buffer_bytes", 0),
        ("snic_bytes_per_s", -1),
        ("cnic_bytes_per_s", 0),
        ("snic_bytes_per_s", (10, 0)),
        ("topology", "1P1D"),
        ("port", 99_999),
        ("transport", "pigeon"),
        ("system", "fast"),
        ("device_layers", 2),
        ("device_copies", "pigeon"),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        ClusterConfig(model="m", store="s", **{name: value})  # type: ignore[arg-type]


def test_vllm_copies_by_itself() -> None:
    with pytest.raises(ValueError, match=r"^--device-copies cnic: vLLM copies by itself; leave it out"):
        ClusterConfig(model="m", store="s", device_copies="cnic", engine="vllm")


def test_each_node_has_the_size_and_the_rates_of_its_group() -> None:
    mixed = Topology.parse("1Px2+1Px4+2D")
    config = ClusterConfig(model="m", store="s", topology=mixed, snic_bytes_per_s=(40, 20, 10), cnic_bytes_per_s=7)
    assert config.snic_rate == 30  # alpha's: of the mean prefill node
    nodes = [(Role.PREFILL, 0), (Role.PREFILL, 1), (Role.DECODE, 0), (Role.DECODE, 1), (Role.DECODE, 9)]
    found = [config.of_node(role, rank) for role, rank in nodes]
    assert [one.topology.sizes[0] for one in found] == [2, 4, 1, 1, 1]
    assert [(one.snic_rate, one.cnic_rate) for one in found] == [(40, 7), (20, 7), (10, 7), (10, 7), (10, 7)]
    oracle = ClusterConfig(model="m", store="s", topology=mixed, snic_bytes_per_s=(4, 2, 1), system="oracle")
    assert oracle.of_node(Role.DECODE, 0).snic_rate is None
    assert oracle.served(1, KVBytes(1)).setup.snic_bytes_per_s is None
    with pytest.raises(ValueError, match="2 rates for 1Px2"):
        ClusterConfig(model="m", store="s", topology=mixed, snic_bytes_per_s=(40, 20))


@pytest.mark.parametrize("nodes", [(0, 1), (1, 0), (-1, 2)])
def test_a_topology_has_a_node_of_each_kind(nodes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one node of each kind"):
        Topology(*nodes)
