"""`dualpath experiment` up to the runs themselves."""

import pytest

from dualpath import cli
from dualpath.lab.experiments import execution
from dualpath.lab.experiments.local_cluster import LaunchError


@pytest.fixture
def planned(monkeypatch):
    """Series and benches as `run_series` gets them; it fails."""
    asked = []

    def fail(series, bench, console, make_launcher):
        asked.append((series, bench))
        raise LaunchError("no cluster here")

    monkeypatch.setattr(execution, "run_series", fail)
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
    ((series, bench),) = planned
    assert [run.name for run in series.runs] == [
        f"1P1D append_tokens={n} basic{more}" for n in (32, 64) for more in ("", " #2")
    ]
    assert [len(agents) for agents in series.trajectories.values()] == [3, 3]
    asked = series.conditions
    assert (asked.snic_bytes_per_s, asked.cnic_bytes_per_s, bench.out) == (10_000_000, None, tmp_path)
    assert bench.command.startswith("dualpath experiment append-scaling --values append_tokens=32,64")
    kept, failed = capsys.readouterr().err.splitlines()
    assert kept.endswith(f"dualpath experiment append-scaling --redraw --out {tmp_path}")
    assert failed == "dualpath experiment: no cluster here"


def test_the_experiments_own_rate_is_the_default(planned):
    cli.main(["experiment", "ablation", "--quick"])
    cli.main(["experiment", "ablation"])
    assert [series.conditions.snic_bytes_per_s for series, _ in planned] == [20_000_000, 40_000_000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no experiment is named; give a NAME from --list"),
        (["nothing"], "no experiment is called 'nothing'; choose from demo, agents-context"),
        (["traces"], "traces replays recorded sessions: give them with --trace"),
        (["traces", "--trace", "absent.json"], "no trace 'absent.json': give"),
        (["ablation", "--values", "speed=1"], "--values: 'speed' can't be varied; choose from agents"),
        (["ablation", "--testbed", "--transport", "nixl"], "--transport: between a testbed's hosts KV moves by tcp"),
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


def test_demo_takes_only_what_is_given_and_keeps_the_command(planned, capsys, tmp_path):
    options = [
        "--agents",
        "2",
        "--snic-rate",
        "unlimited",
        "--repeat",
        "3",
        "--transport",
        "tcp",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["demo", *options]) == 1
    assert capsys.readouterr().err == "dualpath demo: no cluster here\n"
    ((series, bench),) = planned
    asked = series.conditions
    assert (series.kind, series.name, bench.repeats, bench.out) == ("demo", "demo", 3, tmp_path)
    assert bench.transport == "tcp"
    assert (asked.agents, asked.snic_bytes_per_s, asked.cnic_bytes_per_s) == (2, None, 320_000_000)
    assert (asked.topologies, asked.systems) == (("1P1D", "1P2D"), ("basic", "dualpath", "oracle"))
    assert (
        bench.command == f"dualpath demo --agents 2 --snic-rate unlimited --repeat 3 --transport tcp --out {tmp_path}"
    )


def test_demo_and_experiment_have_their_own_directories(planned):
    cli.main(["demo"])
    cli.main(["experiment", "demo"])
    assert [str(bench.out) for _, bench in planned] == ["results", "results/experiments"]
    assert planned[0][0] == planned[1][0]


def test_an_interruption_is_one_line_and_an_exit_code(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(execution, "run_series", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "dualpath: interrupted\n"


def test_help_tells_the_defaults_of_the_demo(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    defaults = ("1P1D,1P2D", "basic,dualpath,oracle", "40MB/s", "320MB/s", "12, or one per recording", "2800", "6144")
    assert [default for default in defaults if f"(default: {default})" not in shown] == []
