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

from dualpath.lab.experiments.cluster_process import ClusterError
from dualpath.lab.experiments.demo.run import plan, run_demo
from dualpath.lab.experiments.demo.workload import build_trajectories
from dualpath.results.file import load


def run(options):
    console = Console(file=io.StringIO(), width=120)
    return run_demo(options, build_trajectories(options), console), console.file.getvalue()


def test_systems_are_replayed_on_fresh_clusters_and_compared(options):
    options = msgspec.structs.replace(options, systems=("basic", "dualpath", "oracle"), snic_bytes_per_s=40_000_000)
    result, shown = run(options)
    assert load(options.out / "demo.json") == result
    assert (options.out / "demo.png").stat().st_size > 10_000
    basic, dualpath, oracle = result.runs
    assert [(one.system, one.turns, one.errors) for one in result.runs] == [
        ("basic", 6, 0),
        ("dualpath", 6, 0),
        ("oracle", 6, 0),
    ]
    # What a system reads is the work's, not the system's: every hit token once, 16 KiB each.
    loaded_bytes = round(basic.hit_rate * result.workload.prompt_tokens) * 16384
    for one in result.runs:
        assert sum(one.snic_bytes.values()) == loaded_bytes > 0
        assert list(one.snic_bytes) == ["PE0", "DE0", "DE1"]
    assert basic.snic_bytes["DE0"] == basic.snic_bytes["DE1"] == 0
    assert basic.snic_max_over_avg == 1.0
    assert min(dualpath.snic_bytes.values()) > 0
    # One NIC can't be faster than its rate; that the clusters really pay it is what the comparison stands on.
    assert basic.jct_s >= loaded_bytes / 40_000_000
    assert dualpath.ratio_to_basic == basic.jct_s / dualpath.jct_s
    assert dualpath.ideal_ratio == min(3.0, basic.jct_s / oracle.jct_s)
    assert dualpath.same_tokens_as_basic == oracle.same_tokens_as_basic == 1.0
    assert "1P2D dualpath: starting, 6 turns" in shown and f"1P2D dualpath: JCT {dualpath.jct_s:.1f} s" in shown
    assert list(options.work.iterdir()) == []


def test_a_run_starts_from_the_store_that_the_warm_up_left(options, fake_serve, tmp_path):
    spy = tmp_path / "spy.py"
    seen = tmp_path / "seen"
    spy.write_text(
        textwrap.dedent(
            f"""\
            import os, pathlib, sys
            store = pathlib.Path(sys.argv[sys.argv.index("--store") + 1])
            with open({str(seen)!r}, "a") as out:
                print(sorted(path.name for path in store.iterdir()), file=out)
            os.execv({fake_serve[0]!r}, [{fake_serve[0]!r}, {fake_serve[1]!r}, *sys.argv[1:]])
            """
        )
    )
    run(msgspec.structs.replace(options, serve_command=(sys.executable, str(spy)), systems=("basic",), repeats=2))
    assert seen.read_text().splitlines() == ["[]", "['block']", "['block']"]


def test_a_cluster_that_can_not_start_is_shown_with_the_end_of_its_log(options):
    options = msgspec.structs.replace(options, serve_command=(*options.serve_command, "--fail-system", "basic"))
    with pytest.raises(ClusterError, match=r"1P2D basic: the cluster ended by itself, exit code 3") as caught:
        run(options)
    assert "out of memory on the fake device" in str(caught.value)
    assert list(options.work.iterdir()) == []


def test_a_model_that_is_half_there_is_not_overwritten(options):
    (options.model / "model.safetensors").unlink()
    with pytest.raises(ClusterError, match=r"lacks model\.safetensors"):
        run(options)


def test_repeats_go_round_with_systems_alternating(options):
    options = msgspec.structs.replace(options, topologies=("1P1D", "1P2D"), repeats=2)
    names = [run.name for run in plan(options, build_trajectories(options)).runs]
    assert names == [
        *("1P1D basic", "1P1D dualpath", "1P2D basic", "1P2D dualpath"),
        *("1P1D basic #2", "1P1D dualpath #2", "1P2D basic #2", "1P2D dualpath #2"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(options, tmp_path, number):
    slow = msgspec.structs.replace(options, snic_bytes_per_s=10_000)
    driver = tmp_path / "driver.py"
    driver.write_text(
        textwrap.dedent(
            """\
            import pathlib, signal, sys
            import msgspec
            from rich.console import Console
            from dualpath.lab.experiments.demo.options import DemoOptions
            from dualpath.lab.experiments.demo.run import run_demo
            from dualpath.lab.experiments.demo.workload import build_trajectories
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
            given = pathlib.Path(sys.argv[1]).read_bytes()
            options = msgspec.json.decode(given, type=DemoOptions, dec_hook=lambda kind, text: kind(text))
            try:
                run_demo(options, build_trajectories(options), Console(stderr=True))
            except KeyboardInterrupt:
                sys.exit(130)
            """
        )
    )
    given = tmp_path / "options.json"
    given.write_bytes(msgspec.json.encode(slow, enc_hook=str))
    process = subprocess.Popen([sys.executable, str(driver), str(given)], start_new_session=True)
    try:
        log = slow.out / "logs" / "1P2D-basic.log"
        wait_until(lambda: log.exists() and (slow.work / "demo" / "ready.json").exists())
        clusters = psutil.Process(process.pid).children(recursive=True)
        assert clusters
        os.kill(process.pid, number)
        assert process.wait(30) == 130
        assert not psutil.wait_procs(clusters, timeout=5)[1]
        assert list(slow.work.iterdir()) == []
    finally:
        process.kill()


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
