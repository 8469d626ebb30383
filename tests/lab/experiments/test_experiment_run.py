"""Plans on clusters of the stand-in: what is written, when, and what is left behind."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import msgspec
import psutil
import pytest
from rich.console import Console

from dualpath.lab.experiments import nic_bytes, run
from dualpath.lab.experiments.cluster_process import ClusterError
from dualpath.lab.experiments.load import Load, make_plan
from dualpath.lab.experiments.run import result_path, run_plan
from dualpath.lab.experiments.settings import Settings
from dualpath.results.file import load


@pytest.fixture
def settings(tmp_path, fake_serve):
    """Small, fast and away from the checkout; the model is never opened by the stand-in."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    return Settings(
        model=model, out=tmp_path / "out", work=tmp_path / "store", serve_command=fake_serve, start_timeout_s=30
    )


SMALL = Load(
    topologies=("1P1D",), systems=("basic", "dualpath"), agents=2, turns=2, context_tokens=200, generate_tokens=4
)


def go(load, settings):
    console = Console(file=io.StringIO(), width=120)
    return run_plan(make_plan("small", load, 0, 1), settings, console), console.file.getvalue()


def test_a_result_file_has_every_turn_and_the_agents(settings, monkeypatch):
    monkeypatch.setattr(nic_bytes, "SAMPLE_S", 0.05)
    settings = msgspec.structs.replace(settings, snic_bytes_per_s=20_000_000)
    result, shown = go(msgspec.structs.replace(SMALL, axes={"agents": (1, 2)}), settings)
    assert load(result_path("small", settings)) == result
    assert (result.kind, result.name) == ("experiment", "small")
    assert shown.count("warm-up: starting, 2 turns") == 1
    assert [(one.parameters, one.system) for one in result.runs] == [
        *(({"agents": 1}, "basic"), ({"agents": 1}, "dualpath")),
        *(({"agents": 2}, "basic"), ({"agents": 2}, "dualpath")),
    ]
    for one in result.runs:
        agents = result.trajectories[one.trajectories]
        assert len(agents) == one.parameters["agents"]
        turns = {(turn.trajectory, turn.round_index) for turn in one.turn_results}
        assert turns == {(agent.id, index) for agent in agents for index in (1, 2)}
        assert (one.first_round, one.turns, one.failures) == (1, len(turns), [])
    last = result.runs[-2]
    assert last.snic_samples and last.snic_samples[-1].received_bytes["PE0"] <= last.snic_bytes["PE0"]
    times_s = [sample.at_s for sample in last.snic_samples]
    assert times_s == sorted(times_s) and times_s[0] >= 0 and times_s[-1] <= last.jct_s + 1
    assert result.runs[3].ratio_to_basic == result.runs[2].jct_s / result.runs[3].jct_s
    assert list(settings.work.iterdir()) == []


def test_what_was_finished_is_kept_when_a_later_run_fails(settings):
    failing = (*settings.serve_command, "--fail-system", "dualpath")
    settings = msgspec.structs.replace(settings, serve_command=failing)
    load_ = msgspec.structs.replace(SMALL, systems=("basic", "oracle", "dualpath"))
    # The warm-up is no system of the comparison: it must not fail with it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "WARM_SYSTEM", "basic")
        with pytest.raises(ClusterError, match="1P1D dualpath: the cluster ended by itself"):
            go(load_, settings)
    kept = load(result_path("small", settings))
    assert [one.system for one in kept.runs] == ["basic", "oracle"]
    assert kept.configuration.systems == ["basic", "oracle", "dualpath"]
    assert list(settings.work.iterdir()) == []
    assert sorted(path.name for path in settings.out.iterdir()) == ["logs", "small.json"]


def test_a_warm_store_goes_with_the_last_run_that_needs_it(settings, tmp_path):
    """Contexts of two lengths need two; at no time do both lie there."""
    seen = tmp_path / "seen"
    spy = tmp_path / "spy.py"
    python, fake = settings.serve_command
    spy.write_text(
        textwrap.dedent(
            f"""\
            import os, pathlib, sys
            work = pathlib.Path(sys.argv[sys.argv.index("--store") + 1]).parent
            rate = sys.argv[sys.argv.index("--snic-rate") + 1]
            with open({str(seen)!r}, "a") as out:
                print(*sorted(path.name for path in work.iterdir() if path.is_dir()), rate, file=out)
            os.execv({python!r}, [{python!r}, {fake!r}, *sys.argv[1:]])
            """
        )
    )
    settings = msgspec.structs.replace(settings, serve_command=(python, str(spy)))
    go(msgspec.structs.replace(SMALL, axes={"context_tokens": (150, 200)}, systems=("basic",)), settings)
    assert seen.read_text().splitlines() == [
        *("warm-0 unlimited", "run warm-0 40000000B/s"),
        *("run warm-1 unlimited", "run warm-1 40000000B/s"),
    ]


def test_the_cluster_of_a_run_is_as_the_server_tells_it_with_the_launchers_rates(settings):
    result, _ = go(msgspec.structs.replace(SMALL, systems=("basic", "oracle"), agents=1, turns=1), settings)
    basic, oracle = (one.cluster for one in result.runs)
    assert (basic.layers, basic.kv_bytes_per_token, basic.transport) == (5, 2560, "tcp")
    assert (basic.snic_bytes_per_s, basic.cnic_bytes_per_s, basic.links) == (40_000_000, 320_000_000, "emulated")
    assert (oracle.snic_bytes_per_s, oracle.cnic_bytes_per_s) == (None, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_keeps_what_it_has(settings, tmp_path, number):
    """Oracle's NICs have no limit; basic's are so slow that it can only be interrupted."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            """\
            import pathlib, signal, sys
            import msgspec
            from rich.console import Console
            from dualpath.lab.experiments.load import Load, make_plan
            from dualpath.lab.experiments.run import run_plan
            from dualpath.lab.experiments.settings import Settings
            signal.signal(signal.SIGINT, signal.default_int_handler)
            given = pathlib.Path(sys.argv[1]).read_bytes()
            settings = msgspec.json.decode(given, type=Settings, dec_hook=lambda kind, text: kind(text))
            load = Load(systems=("oracle", "basic"), agents=2, turns=1, context_tokens=200, generate_tokens=4)
            try:
                run_plan(make_plan("small", load, 0, 1), settings, Console(stderr=True))
            except KeyboardInterrupt:
                sys.exit(130)
            """
        )
    )
    given = tmp_path / "settings.json"
    slow = msgspec.structs.replace(settings, snic_bytes_per_s=10_000)
    given.write_bytes(msgspec.json.encode(slow, enc_hook=str))
    process = subprocess.Popen([sys.executable, str(driver), str(given)], start_new_session=True)
    try:
        basic = settings.out / "logs" / "small" / "1P1D-basic.log"
        wait_until(lambda: basic.exists() and (settings.work / "small" / "ready.json").exists())
        clusters = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        assert process.wait(30) == 130
        assert not psutil.wait_procs(clusters, timeout=5)[1]
    finally:
        process.kill()
    assert [one.system for one in load(result_path("small", settings)).runs] == ["oracle"]
    assert list(settings.work.iterdir()) == []


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
