"""The parts of an experiment: metrics and stores."""

import asyncio

import pytest

from dualpath.lab.experiments.nic_bytes import MetricsError, NicBytes, nic_meter
from dualpath.lab.experiments.preparation import linked_copy


async def read(url):
    async with nic_meter(url) as meter:
        return await meter.read()


def metrics(*figures):
    lines = ["# HELP other x", "other 1", "# TYPE dualpath_nic_bytes_total counter"]
    for engine, role, nic, direction, traffic_class, n_bytes in figures:
        labels = f'engine="{engine}",role="{role}",nic="{nic}",direction="{direction}",traffic_class="{traffic_class}"'
        lines.append(f"dualpath_nic_bytes_total{{{labels}}} {n_bytes}")
    return "\n".join(lines) + "\n"


def test_bytes_of_a_nic_are_summed_over_classes_and_named_by_role_and_rank():
    before = NicBytes(metrics((7, "prefill", "snic", "rx", "low", 10), (2, "decode", "snic", "rx", "low", 1)))
    after = NicBytes(
        metrics(
            (7, "prefill", "snic", "rx", "low", 100),
            (7, "prefill", "snic", "rx", "high", 5),
            (7, "prefill", "snic", "tx", "low", 1000),
            (7, "prefill", "cnic", "rx", "low", 1000),
            (11, "decode", "snic", "rx", "low", 3),
            (2, "decode", "snic", "rx", "low", 1),
        )
    )
    assert after.snic_received_since(before) == {"PE0": 95, "DE0": 0, "DE1": 3}
    assert before != after and before == NicBytes(
        metrics((2, "decode", "snic", "rx", "low", 1), (7, "prefill", "snic", "rx", "low", 10))
    )


def test_engines_of_a_node_have_one_nic():
    text = metrics(*((engine, "decode", "snic", "rx", "low", 10**engine) for engine in range(4)))
    for engine, node in enumerate("abab"):
        text = text.replace(f'engine="{engine}"', f'engine="{engine}",node="host/{node}"')
    assert NicBytes(text).snic_received_since(NicBytes(metrics((9, "decode", "snic", "rx", "low", 0)))) == {
        "DE0": 101,
        "DE1": 1010,
    }


def test_metrics_of_something_else_are_refused():
    with pytest.raises(MetricsError, match="no dualpath_nic_bytes_total"):
        NicBytes("other 1\n")
    with pytest.raises(MetricsError, match=r"127\.0\.0\.1:9/metrics can't be read"):
        asyncio.run(read("http://127.0.0.1:9/v1"))


def test_a_linked_store_shares_blocks_and_nothing_else(tmp_path):
    source, target = tmp_path / "warm", tmp_path / "run"
    (source / "ns" / "ab").mkdir(parents=True)
    (source / "ns" / "ab" / "abc.kv").write_bytes(b"block")
    (source / "ns" / "namespace.json").write_text("{}")
    target.mkdir()
    (target / "old.kv").write_text("of the run before")
    linked_copy(source, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.*")) == [
        "ns/ab/abc.kv",
        "ns/namespace.json",
    ]
    assert (target / "ns/ab/abc.kv").samefile(source / "ns/ab/abc.kv")
    assert not (target / "ns/namespace.json").samefile(source / "ns/namespace.json")
    (target / "ns/ab/abc.kv").rename(target / "aside.kv")
    assert (source / "ns/ab/abc.kv").read_bytes() == b"block"
