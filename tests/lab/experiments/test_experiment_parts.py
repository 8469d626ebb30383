"""The parts of an experiment: metrics, stores, figures from measurements."""

import asyncio

import pytest

from dualpath.lab.experiments.assemble import Measured, assemble, ideal_ratio, snic_max_over_avg
from dualpath.lab.experiments.nic_bytes import MetricsError, NicBytes, nic_meter
from dualpath.lab.experiments.plan import Plan, PlannedRun, Point, runs_of
from dualpath.lab.experiments.settings import Settings
from dualpath.lab.experiments.stores import linked_copy
from dualpath.results.turns import ReplayResult, TurnFailure, TurnResult
from dualpath.traces.generate import AgentMix, generate_trajectories


async def read(url):
    async with nic_meter(url) as meter:
        return await meter.read()


def metrics(*figures):
    lines = ["# HELP other x", "other 1", "# TYPE dualpath_nic_bytes_total counter"]
    for engine, role, nic, direction, traffic_class, n_bytes in figures:
        labels = f'engine="{engine}",role="{role}",nic="{nic}",direction="{direction}",traffic_class="{traffic_class}"'
        lines.append(f"dualpath_nic_bytes_total{{{labels}}} {n_bytes}")
    return "\n".join(lines) + "\n"


def test_bytes_of_a_nic_are_summed_over_classes_and_named_by_role_and_rank():
    before = NicBytes(metrics((7, "prefill", "snic", "rx", "low", 10), (2, "decode", "snic", "rx", "low", 1)))
    after = NicBytes(
        metrics(
            (7, "prefill", "snic", "rx", "low", 100),
            (7, "prefill", "snic", "rx", "high", 5),
            (7, "prefill", "snic", "tx", "low", 1000),
            (7, "prefill", "cnic", "rx", "low", 1000),
            (11, "decode", "snic", "rx", "low", 3),
            (2, "decode", "snic", "rx", "low", 1),
        )
    )
    assert after.snic_received_since(before) == {"PE0": 95, "DE0": 0, "DE1": 3}
    assert before != after and before == NicBytes(
        metrics((2, "decode", "snic", "rx", "low", 1), (7, "prefill", "snic", "rx", "low", 10))
    )


def test_metrics_of_something_else_are_refused():
    with pytest.raises(MetricsError, match="no dualpath_nic_bytes_total"):
        NicBytes("other 1\n")
    with pytest.raises(MetricsError, match=r"127\.0\.0\.1:9/metrics can't be read"):
        asyncio.run(read("http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    ("system", "snic_bytes", "expected"),
    [
        ("basic", {"PE0": 60, "PE1": 20, "DE0": 0}, 1.5),
        ("basic-layerwise", {"PE0": 60, "DE0": 0}, 1.0),
        ("dualpath", {"PE0": 60, "DE0": 20}, 1.5),
        ("de-only", {"PE0": 0, "DE0": 30, "DE1": 10}, 1.5),
        ("oracle", {"PE0": 0, "DE0": 0}, None),
    ],
)
def test_balance_is_over_the_engines_a_system_may_read_with(system, snic_bytes, expected):
    assert snic_max_over_avg(system, snic_bytes) == expected


def test_the_ideal_is_bound_by_nics_and_by_free_io():
    assert ideal_ratio("1P2D", 50.0, 10.0) == 3.0
    assert ideal_ratio("1P2D", 50.0, 20.0) == 2.5
    assert ideal_ratio("2P1D", 50.0, None) == 1.5


BASIC_ON_1P1D = Point(topology="1P1D", systems=("basic", "dualpath", "oracle"), agents="agents")
AGENTS = generate_trajectories(AgentMix(turns=3, first_context_tokens=200, append_tokens=70, generate_tokens=4), 3, 0)
PLAN = Plan(name="n", trajectories={"agents": AGENTS}, runs=runs_of([BASIC_ON_1P1D], 3), source="generated, seed 0")


def measured(system, jct_s, digests=("a", "b"), repeat=0, failures=(), point=BASIC_ON_1P1D):
    turns = tuple(
        TurnResult(
            trajectory="t",
            round_index=index,
            tries=1 + index,
            start_s=0.0,
            ttft_s=1.0 + index,
            ttst_s=None,
            tpot_s=0.1,
            latency_s=2.0,
            prompt_tokens=100,
            loaded_tokens=64,
            generated_tokens=1,
            output_digest=digest,
        )
        for index, digest in enumerate(digests)
    )
    replay = ReplayResult(jct_s=jct_s, turns=turns, failures=failures)
    return Measured(planned=PlannedRun(point, system, repeat), replay=replay, snic_bytes={"PE0": 30, "DE0": 10})


def test_runs_are_set_against_basics_median():
    runs = [
        *(measured("basic", jct_s, repeat=i) for i, jct_s in enumerate((40.0, 10.0, 20.0))),
        measured("dualpath", 16.0, ("a", "x")),
        measured("oracle", 10.0, ()),
    ]
    result = assemble(runs, PLAN, Settings(), "2 cores")
    dualpath, oracle = result.runs[3:]
    assert (dualpath.ratio_to_basic, dualpath.ideal_ratio, dualpath.ratio_to_ideal) == (1.25, 2.0, 0.625)
    assert (dualpath.ttft_p50_s, dualpath.ttst_p50_s, dualpath.tpot_p99_s) == (1.5, None, 0.1)
    assert (dualpath.hit_rate, dualpath.turns, dualpath.retries, dualpath.same_tokens_as_basic) == (0.64, 2, 1, 0.5)
    assert (oracle.ratio_to_basic, oracle.ratio_to_ideal, oracle.same_tokens_as_basic) == (2.0, None, None)
    assert [run.same_tokens_as_basic for run in result.runs[:3]] == [None, 1.0, 1.0]
    assert [run.ratio_to_ideal for run in result.runs[:3]] == [None] * 3


def test_without_basic_there_are_no_ratios_and_failures_count_what_they_abandoned():
    lost = TurnFailure(trajectory="t", round_index=1, tries=3, message="HTTP 503: no engine", abandoned_rounds=4)
    result = assemble([measured("dualpath", 5.0, failures=(lost,))], PLAN, Settings(), "2 cores")
    (run,) = result.runs
    assert (run.ratio_to_basic, run.ideal_ratio, run.ratio_to_ideal, run.errors) == (None, None, None, 5)
    assert run.error_messages == ["t, turn 1: HTTP 503: no engine"]


def test_a_run_that_lost_turns_is_compared_with_nothing():
    lost = TurnFailure(trajectory="t", round_index=1, tries=3, message="HTTP 503: no engine", abandoned_rounds=4)
    runs = [
        measured("basic", 40.0),
        measured("basic", 1.0, repeat=1, failures=(lost,)),
        measured("dualpath", 20.0),
        measured("oracle", 1.0, failures=(lost,)),
    ]
    basic, failed_basic, dualpath, oracle = assemble(runs, PLAN, Settings(), "2 cores").runs
    assert (basic.ratio_to_basic, failed_basic.ratio_to_basic, oracle.ratio_to_basic) == (1.0, None, None)
    assert (dualpath.ratio_to_basic, dualpath.ideal_ratio) == (2.0, 2.0)


def test_a_linked_store_shares_blocks_and_nothing_else(tmp_path):
    source, target = tmp_path / "warm", tmp_path / "run"
    (source / "ns" / "ab").mkdir(parents=True)
    (source / "ns" / "ab" / "abc.kv").write_bytes(b"block")
    (source / "ns" / "namespace.json").write_text("{}")
    target.mkdir()
    (target / "old.kv").write_text("of the run before")
    linked_copy(source, target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.*")) == [
        "ns/ab/abc.kv",
        "ns/namespace.json",
    ]
    assert (target / "ns/ab/abc.kv").samefile(source / "ns/ab/abc.kv")
    assert not (target / "ns/namespace.json").samefile(source / "ns/namespace.json")
    (target / "ns/ab/abc.kv").rename(target / "aside.kv")
    assert (source / "ns/ab/abc.kv").read_bytes() == b"block"
