"""`dualpath demo` from its command line to its files, on clusters of the stand-in."""

import json

import msgspec
import pytest

from dualpath import cli
from dualpath.cli import experiment
from dualpath.lab.experiments.conditions import DEMO
from dualpath.lab.experiments.series import agents_under
from dualpath.results import load_results

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(bench, monkeypatch):
    """Runs the command, small and fast; returns its exit code."""

    def run(*options, serve_command=bench.serve_command):
        made = experiment.bench_of
        with monkeypatch.context() as patch:
            stand_in = {"serve_command": serve_command}
            patch.setattr(experiment, "bench_of", lambda *given: msgspec.structs.replace(made(*given), **stand_in))
            places = ("--model", bench.model, "--out", bench.out, "--work", bench.work)
            small = ("--agents", 3, "--turns", 2, "--context", 200, "--append", 70, "--generate", 4)
            return cli.main(["demo", *map(str, (*places, *small, *options))])

    return run


def test_systems_are_replayed_on_fresh_clusters_and_compared(demo, bench, capsys):
    assert demo("--topologies", "1P2D", "--json", bench.out.parent / "copy.json") == 0
    result = load_results(bench.out / "demo.json")
    assert (result.kind, result.name) == ("demo", "demo")
    assert (bench.out / "demo.png").stat().st_size > 10_000
    assert (bench.out / "demo.html").read_text().startswith("<!DOCTYPE html>")
    assert load_results(bench.out.parent / "copy.json") == result
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
    shown = capsys.readouterr().out
    assert "1P2D dualpath: starting, 6 turns" in shown and f"1P2D dualpath: JCT {dualpath.jct_s:.1f} s" in shown
    assert "Every system generated the same tokens in every turn." in shown
    assert f"written: {bench.out}/demo.json, {bench.out}/demo.png, {bench.out}/demo.html" in " ".join(shown.split())
    assert list(bench.work.iterdir()) == []
    assert not (bench.out / "README.md").exists()


def test_a_cluster_that_can_not_start_ends_the_demo_with_its_log(demo, bench, capsys):
    assert demo("--systems", "basic", serve_command=(*bench.serve_command, "--fail-system", "basic")) == 1
    said = capsys.readouterr().err
    assert said.startswith("dualpath demo: 1P1D basic: the cluster ended by itself, exit code 3")
    assert "out of memory on the fake device" in said


def test_recorded_agents_are_dealt_out_or_come_one_each(tmp_path):
    turns = [{"type": "s", "in": 640 + 64 * i, "out": 1, "hash_ids": list(range(10 + i))} for i in range(4)]
    path = tmp_path / "session.json"
    nested = {"type": "subagent", "requests": [{"type": "s", "in": 64, "out": 1, "hash_ids": [1]}]}
    path.write_text(json.dumps({"id": "s", "requests": [*turns[:2], nested, *turns[2:]]}))
    recorded = msgspec.structs.replace(DEMO, traces=(str(path),), scale=2, turns=2)
    (alone,) = agents_under(recorded, 0)
    agents = agents_under(msgspec.structs.replace(recorded, agents=2), 0)
    assert [agent.id for agent in agents] == ["agent-0000", "agent-0001"] and agents[0] == alone
    assert [span.prompt_tokens for span in agents[0].spans()] == [320, 352, 384]
    assert agents[1].rounds[1].subagents[0].id == "agent-0001/1.0"


def test_without_a_number_twelve_agents_are_generated():
    assert [len(agent.rounds) for agent in agents_under(DEMO, 0)] == [1 + DEMO.turns] * 12
