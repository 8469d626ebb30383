"""`dualpath qos …` as people type it."""

from pathlib import Path

import pytest

from dualpath.cli import main


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("render --fabric roce", "--device: name the NIC"),
        ("check --fabric linux", "--device: name the NIC"),
        ("render --fabric roce --device eth0;reboot", "--device: name the NIC"),
        ("render --fabric roce --device ..", "--device: name the NIC"),
        ("render --fabric roce --device=-x", "--device: name the NIC"),
        ("check --fabric infiniband --device eth0", "--device: not of --fabric infiniband"),
        ("render --fabric roce --device eth0 --storage-guid 0x5", "--storage-guid: not of --fabric roce"),
        ("check --fabric linux --device eth0 --opensm-conf f", "--opensm-conf: not of --fabric linux"),
        ("render --fabric roce --device eth0 --rate 1GB/s", "--rate: not of --fabric roce"),
        ("render --fabric linux --device eth0", "--rate: give the link's rate"),
        ("render --fabric infiniband --storage-guid 5", "'5' is not the GUID of a port"),
        (
            "check --fabric infiniband --opensm-conf /nowhere/opensm.conf",
            "can't check: /nowhere/opensm.conf can't be read",
        ),
        ("check --fabric linux --device nowhere0", "can't check: tc -j qdisc show dev nowhere0"),
    ],
)
def test_what_can_not_be_ends_with_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qos", *line.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("weights", ["99", "1:99", "99:0", "a:b", "99:1:1", "9" * 5000 + ":1", "٩٩:١"])
def test_weights_are_two_numbers(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["qos", "render", "--fabric", "infiniband", "--weights", weights])
    assert ended.value.code == 2
    assert "give them like 99:1" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["", "render", "check"])
def test_help_has_an_example(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["qos", *action.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"dualpath qos {action}".strip() in shown.partition("example")[2]
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_files_are_written_or_printed_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qos", "render", "--fabric", "infiniband", "--storage-guid", "0xab", "--out", str(tmp_path)]) == 0
    named = capsys.readouterr().out.split()
    assert sorted(Path(name).name for name in named) == ["engine.env", "opensm-qos.conf", "qos-policy.conf"]
    assert main(["qos", "render", "--fabric", "infiniband", "--storage-guid", "0xab"]) == 0
    printed = capsys.readouterr().out
    assert all(f"# {Path(name).name}\n{Path(name).read_text()}" in printed for name in named)
    assert "any, target-port-guid 0xab : 2" in printed


def test_weights_that_come_out_otherwise_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qos", "render", "--fabric", "roce", "--device", "eth2", "--weights", "999:1"]) == 0
    assert capsys.readouterr().err == (
        "dualpath qos: --weights 999:1 can't be kept here: KV has 1.01% of a link that model messages fill, not 0.10%\n"
    )


def test_no_folder_is_not_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["qos", "render", "--fabric", "infiniband", "--out", ""])
    assert "name a folder" in capsys.readouterr().err


def test_a_report_that_can_not_be_written_is_printed_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qos", "check", "--fabric", "linux", "--device", "lo", "--json", "/nowhere/report.json"]) == 2
    shown = capsys.readouterr()
    assert "values compared at lo" in shown.out and "can't write the report" in shown.err
