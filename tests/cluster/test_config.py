"""A cluster's settings refuse what can't be, by name, also from Python."""

import pytest

from dualpath.cluster.config import ClusterConfig
from dualpath.spec.topology import Topology


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", 0),
        ("quota_ns", -1),
        ("buffer_bytes", 0),
        ("snic_bytes_per_s", -1),
        ("cnic_bytes_per_s", 0),
        ("topology", "1P1D"),
        ("port", 99_999),
        ("transport", "pigeon"),
        ("system", "fast"),
        ("device_layers", 2),
    ],
)
def test_a_setting_that_cannot_be_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        ClusterConfig(model="m", store="s", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [(0, 1), (1, 0), (-1, 2)])
def test_a_topology_has_a_node_of_each_kind(nodes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one node of each kind"):
        Topology(*nodes)
