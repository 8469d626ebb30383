"""docs/how-to/plan-capacity.md: its commands run, its TOML is a cluster, its presets are all there are."""

import re
import shlex
from pathlib import Path

import pytest

from dualpath.cli import main
from dualpath.lab.facts.cluster_files import preset_names
from dualpath.lab.facts.hardware import GPUS

DOCUMENT = (Path(__file__).parents[3] / "docs" / "how-to" / "plan-capacity.md").read_text(encoding="utf-8")
PROFILES = (Path(__file__).parents[3] / "docs" / "design" / "profile.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.S) for line in block.splitlines() if line]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_document_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-cluster.toml").write_text(re.search(r"```toml\n(.*?)```", DOCUMENT, re.S)[1], encoding="utf-8")
    (tmp_path / "profile.json").write_text(re.search(r"```json\n(.*?)```", PROFILES, re.S)[1], encoding="utf-8")
    program, *arguments = shlex.split(command)
    assert program == "dualpath"
    assert main(arguments) == 0
    assert "Agents/s that each resource allows" in capsys.readouterr().out


def test_there_are_commands():
    assert len(COMMANDS) >= 4


def test_the_document_and_the_help_name_every_preset_and_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    for name in preset_names():
        assert f"`{name}`" in DOCUMENT
        assert name in shown
    assert all(gpu in DOCUMENT for gpu in GPUS)
