"""`dualpath experiment` up to the runs themselves."""

import pytest

from dualpath import cli
from dualpath.lab.experiments import run as experiment_run
from dualpath.lab.experiments.cluster_process import ClusterError


@pytest.fixture
def planned(monkeypatch):
    """Plans and settings as `run_plan` gets them; it fails."""
    asked = []

    def fail(plan, settings, console, make_launcher):
        asked.append((plan, settings))
        raise ClusterError("no cluster here")

    monkeypatch.setattr(experiment_run, "run_plan", fail)
    return asked


def test_the_list_names_every_experiment(capsys):
    from dualpath.lab.experiments.catalog import EXPERIMENTS

    assert cli.main(["experiment", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(one.name in shown and one.expect.split()[0] in shown for one in EXPERIMENTS)


def test_options_change_the_load_and_a_failure_says_what_is_kept(planned, capsys, tmp_path):
    options = ["--values", "append_tokens=32,64", "--topologies", "1P1D", "--systems", "basic", "--agents", "3"]
    options += ["--snic-rate", "10MB/s", "--cnic-rate", "unlimited", "--repeat", "2", "--out", str(tmp_path)]
    assert cli.main(["experiment", "append-scaling", *options]) == 1
    ((plan, settings),) = planned
    assert [run.name for run in plan.runs] == [
        f"1P1D append_tokens={n} basic{more}" for n in (32, 64) for more in ("", " #2")
    ]
    assert [len(agents) for agents in plan.trajectories.values()] == [3, 3]
    assert (settings.snic_bytes_per_s, settings.cnic_bytes_per_s, settings.out) == (10_000_000, None, tmp_path)
    assert settings.command.startswith("dualpath experiment append-scaling --values append_tokens=32,64")
    kept, failed = capsys.readouterr().err.splitlines()
    assert kept.endswith(f"dualpath experiment append-scaling --redraw --out {tmp_path}")
    assert failed == "dualpath experiment: no cluster here"


def test_the_experiments_own_rate_is_the_default(planned):
    cli.main(["experiment", "ablation", "--quick"])
    cli.main(["experiment", "ablation"])
    assert [settings.snic_bytes_per_s for _, settings in planned] == [20_000_000, 40_000_000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which experiment? name one, or see --list"),
        (["nothing"], "no experiment is called 'nothing'; choose from agents-context"),
        (["traces"], "traces replays recorded sessions: give them with --trace"),
        (["traces", "--trace", "absent.json"], "no trace 'absent.json': give"),
        (["ablation", "--values", "speed=1"], "--values: 'speed' can't be varied; choose from agents"),
    ],
)
def test_what_can_not_be_run_is_a_wrong_command(arguments, message, capsys):
    assert cli.main(["experiment", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"dualpath experiment: {message}")


def test_an_axis_without_values_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["experiment", "ablation", "--values", "agents"])
    assert "'agents' is not like agents=4,8,16" in capsys.readouterr().err


def test_redrawing_needs_a_result(capsys, tmp_path):
    assert cli.main(["experiment", "ablation", "--redraw", "--out", str(tmp_path)]) == 1
    assert "ablation.json can't be read" in capsys.readouterr().err
