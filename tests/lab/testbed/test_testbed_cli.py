"""`dualpath testbed …` as people type it."""

import json
from pathlib import Path

import pytest
from bed import NAME, SUBNET

from dualpath.cli import main
from dualpath.lab.testbed import iproute
from dualpath.lab.testbed.network import leftovers


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("up 0P1D", "'0P1D' is not a topology"),
        ("up 1P1D --name a-b", "'a-b' can't be a testbed's name"),
        ("up --subnet 10", "not the first half of an IPv4 address"),
        ("down --name A", "can't be a testbed's name"),
        ("run --model nowhere --store x", "nowhere has no config.json"),
        ("qos --cnic-rate unlimited", "without one there is nothing to share"),
        ("qos --transport pigeons", "unknown transport 'pigeons'"),
    ],
)
def test_a_wrong_value_ends_with_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["testbed", *line.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("action", ["", "up", "status", "down", "run", "qos"])
def test_help_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["testbed", *action.split(), "--help"])
    assert ended.value.code == 0
    assert f"dualpath testbed {action}".strip() in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("ftp://host/kv", "unknown kind of store 'ftp'"),
        ("s3://kv?token=1", "shows in process lists"),
        ("s3://", "opened"),
    ],
)
def test_a_store_that_can_not_be_is_told_before_anything_starts(
    store: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["serve", "--model", str(tmp_path), "--store", store]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("action", ["up 1P1D", "down", "status", "qos"])
def test_it_says_that_it_needs_root(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(iproute, "_which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(iproute.os, "geteuid", lambda: 1000)
    assert main(["testbed", *action.split()]) == 1
    assert "network namespaces need root" in capsys.readouterr().err


@pytest.mark.privileged
def test_up_status_down(testbed_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = ["--name", testbed_name]
    assert main(["testbed", "up", "1P2D", *name, "--subnet", SUBNET, "--snic-rate", "30MB/s"]) == 0
    assert f"dualpath-{NAME}-de1" in capsys.readouterr().out
    assert main(["testbed", "up", "1P2D", *name, "--subnet", SUBNET]) == 1
    assert "is up, or was left over" in capsys.readouterr().err
    assert main(["testbed", "status", *name, "--json", str(tmp_path / "status.json")]) == 0
    report = json.loads((tmp_path / "status.json").read_bytes())
    assert [node["name"] for node in report["nodes"]] == ["head", "storage", "pe0", "de0", "de1"]
    assert report["testbed"]["rates"] == {"snic": 30_000_000, "cnic": None, "storage_node": None}
    assert main(["testbed", "down", *name]) == 0
    assert leftovers(testbed_name) == []
    assert main(["testbed", "status", *name]) == 1
    assert main(["testbed", "down", *name]) == 0
    assert "nothing to remove: there is no testbed" in capsys.readouterr().out


@pytest.mark.privileged
@pytest.mark.slow
def test_qos_measures_every_phase_and_leaves_nothing(testbed_name: str, tmp_path: Path) -> None:
    """What it finds depends on how busy the machine is; that it finds something does not."""
    out = tmp_path / "qos.json"
    line = ["testbed", "qos", "--name", testbed_name, "--cnic-rate", "20MB/s", "--seconds", "0.5", "--rounds", "1"]
    assert main([*line, "--json", str(out)]) in (0, 1)
    report = json.loads(out.read_bytes())
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert list(phases) == ["idle", "elsewhere", "fifo", "classes", "kv alone"]
    for kind in ("pings", "all_to_alls"):
        assert all(phase[kind]["messages"] > 0 for name, phase in phases.items() if name != "kv alone")
        assert phases["kv alone"][kind] is None
        one_round = phases["classes"][kind]["p50_us"] / phases["idle"][kind]["p50_us"]
        assert report[kind]["idle"] == {"median": one_round, "low": one_round, "high": one_round}
    assert all(phases[name]["kv_bytes_per_s"] > 0 for name in ("elsewhere", "fifo", "classes", "kv alone"))
    assert phases["idle"]["kv_bytes_per_s"] is None
    assert phases["classes"]["high_bytes_per_s"] > 0
    assert leftovers(testbed_name) == []


@pytest.mark.privileged
def test_qos_refuses_a_transport_whose_class_the_kernel_does_not_see(
    testbed_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shared memory goes past every NIC."""
    line = ["testbed", "qos", "--name", testbed_name, "--cnic-rate", "20MB/s", "--seconds", "0.3", "--rounds", "1"]
    assert main([*line, "--transport", "shm"]) == 1
    assert "the kernel saw 0 of the " in capsys.readouterr().err
    assert leftovers(testbed_name) == []
