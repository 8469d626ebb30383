"""Clusters: every preset, what they say, and errors that name the file and the key."""

import re

import pytest

from dualpath.lab.facts.cluster import ClusterError, node_groups
from dualpath.lab.facts.cluster_files import load_cluster, preset_names
from dualpath.lab.facts.hardware import DRAM_BYTES_PER_S, NIC_400G_BYTES_PER_S

TOML = """\
model = "ds-27b"
topology = "1P2Dx8"
expert_parallel = true
[node]
gpu = "h100"
cnic = "400Gb/s"
snic = "200Gb/s"
dram = "500GB/s"
dram_buffer = "80GB"
"""


def test_the_presets_are_the_papers_clusters():
    nodes = {name: (load_cluster(name).prefill_nodes, load_cluster(name).decode_nodes) for name in preset_names()}
    assert nodes == {
        "ds660b-2p4d": (2, 4),
        "ds660b-44p88d": (44, 88),
        "ds660b-48p96d": (48, 96),
        "ds27b-1p1d": (1, 1),
        "ds27b-2p1d": (2, 1),
        "ds27b-1p2d": (1, 2),
        "qwen32b-1p2d": (1, 2),
    }


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_the_papers_node_and_holds_its_weights(name):
    cluster = load_cluster(name)
    assert (cluster.engines_per_node, cluster.snic_ratio) == (8, 1)
    assert (cluster.cnic_bytes_per_s, cluster.dram_bytes_per_s) == (NIC_400G_BYTES_PER_S, DRAM_BYTES_PER_S)
    longest = 65_536 * cluster.kv_bytes_per_token
    assert cluster.decode_kv_bytes > longest
    assert cluster.prefill_kv_bytes > longest
    assert cluster.dram_buffer_bytes > cluster.engines_per_node * longest


def test_48p96d_has_1152_gpus():
    cluster = load_cluster("ds660b-48p96d")
    assert cluster.prefill_engines + cluster.decode_engines == 1152


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace("x8", "x4") + "[efficiency]\nsnic = 0.5\n")
    cluster = load_cluster(path)
    assert (cluster.name, cluster.engines_per_node, cluster.snic_ratio) == ("mine", 4, 0.5)
    assert cluster.usable_snic_bytes_per_s == 12.5e9
    assert cluster.kv_dtype == "fp8"
    assert cluster.with_nodes(2, 1).prefill_engines == 8


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        ('gpu = "h100"', 'gpu = "tpu"', "node.gpu: no GPU 'tpu'; known are h100, h800, h200"),
        ('cnic = "400Gb/s"', 'cnic = "fast"', "node.cnic: 'fast' is not a rate"),
        ('snic = "200Gb/s"', 'snic = "unlimited"', "node.snic: a cluster's link needs a rate"),
        ('dram_buffer = "80GB"', 'dram_buffer = "0GB"', "node.dram_buffer: must be above zero"),
        ("1P2Dx8", "0P2D", "topology: '0P2D' is not a topology"),
        ("topology =", "topologie =", "Object contains unknown field `topologie`"),
        ("200Gb/s", "200Gb/s+100Gb/s+50Gb/s", "node.snic: 3 rates for 1P2Dx8, which has 2 groups"),
        ('dram = "500GB/s"', 'dram = "500GB/s"\ncolour = "red"', "node: Object contains unknown field `colour`"),
        ('model = "ds-27b"', 'model = "gpt-9"', "model: no model 'gpt-9'"),
        ('model = "ds-27b"', 'model = "ds-27b"\nkv_dtype = "int3"', "kv_dtype: KV dtype 'int3' is unknown"),
        ("[node]", "[node", "is not TOML"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, line, instead, message):
    assert line in TOML
    path = tmp_path / "mine.toml"
    path.write_text(TOML.replace(line, instead))
    with pytest.raises(ClusterError, match=re.escape("mine.toml: ") + ".*" + re.escape(message)):
        load_cluster(path)


def test_an_efficiency_is_a_share(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML + "[efficiency]\nsnic = 1.5\n")
    with pytest.raises(ClusterError, match=r"efficiency\.snic: Expected `float` <= 1"):
        load_cluster(path)


def test_the_same_nodes_with_another_model():
    cluster = load_cluster("qwen32b-1p2d").with_model("gpt-oss-120b")
    assert (cluster.kv_bytes_per_token, cluster.weight_bytes_per_parameter) == (36_864, 0.53125)
    assert cluster.prefill_weight_bytes == pytest.approx(116.8e9 * 0.53125, rel=0.01)
    with pytest.raises(ClusterError, match="no model 'gpt-9'"):
        cluster.with_model("gpt-9")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ClusterError, match="no cluster 'ds660b': give one of ds27b-1p1d"):
        load_cluster("ds660b")
    with pytest.raises(ClusterError, match="can't be read"):
        load_cluster("nothing.toml")


@pytest.mark.parametrize(
    ("nodes", "group_nodes", "groups"),
    [(4, 4, [0, 0, 0, 0]), (3, 4, [0, 0, 0]), (4, 2, [0, 0, 1, 1]), (5, 2, [0, 0, 0, 1, 1])],
)
def test_groups_of_nodes_are_even_and_never_too_small(nodes, group_nodes, groups):
    assert node_groups(nodes, group_nodes) == groups
