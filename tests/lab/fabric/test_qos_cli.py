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


@pytest.mark.parametrize("weights", ["99", "1:99", "99:0", "a:b", "99:1:1"])
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
