"""Series on clusters of the stand-in: what is written, when, and what is left behind."""

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

from dualpath.lab.experiments import execution, nic_bytes
from dualpath.lab.experiments.conditions import Conditions
from dualpath.lab.experiments.execution import result_path, run_series
from dualpath.lab.experiments.local_cluster import LaunchError
from dualpath.lab.experiments.series import series_of
from dualpath.results import load_results

pytestmark = pytest.mark.slow

SMALL = Conditions(
    topologies=("1P1D",), systems=("basic", "dualpath"), agents=2, turns=2, context_tokens=200, generate_tokens=4
)


def go(conditions, bench):
    console = Console(file=io.StringIO(), width=120)
    return run_series(series_of("small", conditions, 0, 1), bench, console), console.file.getvalue()


def test_a_result_file_has_every_turn_and_the_agents(bench, monkeypatch):
    monkeypatch.setattr(nic_bytes, "SAMPLE_S", 0.05)
    small = msgspec.structs.replace(SMALL, axes={"agents": (1, 2)}, snic_bytes_per_s=20_000_000)
    result, shown = go(small, bench)
    assert load_results(result_path("small", bench.out)) == result
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
    assert list(bench.work.iterdir()) == []


def test_what_was_finished_is_kept_when_a_later_run_fails(bench):
    failing = (*bench.serve_command, "--fail-system", "dualpath")
    bench = msgspec.structs.replace(bench, serve_command=failing)
    asked = msgspec.structs.replace(SMALL, systems=("basic", "oracle", "dualpath"))
    # The warm-up is no system of the comparison: it must not fail with it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "WARM_SYSTEM", "basic")
        with pytest.raises(LaunchError, match="1P1D dualpath: the cluster ended by itself"):
            go(asked, bench)
    kept = load_results(result_path("small", bench.out))
    assert [one.system for one in kept.runs] == ["basic", "oracle"]
    assert kept.configuration.systems == ["basic", "oracle", "dualpath"]
    assert list(bench.work.iterdir()) == []
    assert sorted(path.name for path in bench.out.iterdir()) == ["logs", "small.json"]


def test_a_run_starts_from_the_store_that_the_warm_up_left(bench, tmp_path):
    spy = tmp_path / "spy.py"
    seen = tmp_path / "seen"
    python, fake = bench.serve_command
    spy.write_text(
        textwrap.dedent(
            f"""\
            import os, pathlib, sys
            store = pathlib.Path(sys.argv[sys.argv.index("--store") + 1])
            with open({str(seen)!r}, "a") as out:
                print(sorted(path.name for path in store.iterdir()), file=out)
            os.execv({python!r}, [{python!r}, {fake!r}, *sys.argv[1:]])
            """
        )
    )
    asked = msgspec.structs.replace(SMALL, systems=("basic", "dualpath"))
    go(asked, msgspec.structs.replace(bench, serve_command=(sys.executable, str(spy))))
    assert seen.read_text().splitlines() == ["[]", "['block']", "['block']"]


def test_a_warm_store_goes_with_the_last_run_that_needs_it(bench, tmp_path):
    """Contexts of two lengths need two; at no time do both lie there."""
    seen = tmp_path / "seen"
    spy = tmp_path / "spy.py"
    python, fake = bench.serve_command
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
    bench = msgspec.structs.replace(bench, serve_command=(python, str(spy)))
    go(msgspec.structs.replace(SMALL, axes={"context_tokens": (150, 200)}, systems=("basic",)), bench)
    assert seen.read_text().splitlines() == [
        *("warm-0 unlimited", "run warm-0 40000000B/s"),
        *("run warm-1 unlimited", "run warm-1 40000000B/s"),
    ]


def test_a_cluster_that_can_not_start_is_shown_with_the_end_of_its_log(bench):
    bench = msgspec.structs.replace(bench, serve_command=(*bench.serve_command, "--fail-system", "basic"))
    with pytest.raises(LaunchError, match=r"1P1D basic: the cluster ended by itself, exit code 3") as caught:
        go(SMALL, bench)
    assert "out of memory on the fake device" in str(caught.value)
    assert list(bench.work.iterdir()) == []


def test_a_model_that_is_half_there_is_not_overwritten(bench):
    (bench.model / "model.safetensors").unlink()
    with pytest.raises(LaunchError, match=r"lacks model\.safetensors"):
        go(SMALL, bench)


def test_the_cluster_of_a_run_is_as_the_server_tells_it_with_the_launchers_rates(bench):
    result, _ = go(msgspec.structs.replace(SMALL, systems=("basic", "oracle"), agents=1, turns=1), bench)
    basic, oracle = (one.cluster for one in result.runs)
    assert (basic.layers, basic.kv_bytes_per_token, basic.transport) == (5, 2560, "tcp")
    assert (basic.snic_bytes_per_s, basic.cnic_bytes_per_s, basic.links) == (40_000_000, 320_000_000, "emulated")
    assert (oracle.snic_bytes_per_s, oracle.cnic_bytes_per_s) == (None, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_experiment_keeps_what_it_has(bench, tmp_path, number):
    """Oracle's NICs have no limit; basic's are so slow that it can only be interrupted."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            """\
            import pathlib, signal, sys
            import msgspec
            from rich.console import Console
            from dualpath.lab.experiments.conditions import Bench, Conditions
            from dualpath.lab.experiments.execution import run_series
            from dualpath.lab.experiments.series import series_of
            signal.signal(signal.SIGINT, signal.default_int_handler)
            given = pathlib.Path(sys.argv[1]).read_bytes()
            bench = msgspec.json.decode(given, type=Bench, dec_hook=lambda kind, text: kind(text))
            asked = Conditions(
                systems=("oracle", "basic"),
                snic_bytes_per_s=10_000, agents=2, turns=1, context_tokens=200, generate_tokens=4,
            )
            try:
                run_series(series_of("small", asked, 0, 1), bench, Console(stderr=True))
            except KeyboardInterrupt:
                sys.exit(130)
            """
        )
    )
    given = tmp_path / "bench.json"
    given.write_bytes(msgspec.json.encode(bench, enc_hook=str))
    process = subprocess.Popen([sys.executable, str(driver), str(given)], start_new_session=True)
    try:
        basic = bench.out / "logs" / "small" / "1P1D-basic.log"
        wait_until(lambda: basic.exists() and (bench.work / "small" / "ready.json").exists())
        clusters = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        assert process.wait(30) == 130
        assert not psutil.wait_procs(clusters, timeout=5)[1]
    finally:
        process.kill()
    assert [one.system for one in load_results(result_path("small", bench.out)).runs] == ["oracle"]
    assert list(bench.work.iterdir()) == []


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
