"""Runs from measurements: ratios to the baseline and the ideal, balance, and what the agents asked."""

import pytest

from dualpath.results.build import compared, ideal_ratio, run_of, snic_max_over_avg, workload_of
from dualpath.results.turns import ReplayResult, TurnFailure, TurnResult
from dualpath.spec.cluster_setup import ClusterSetup
from dualpath.traces.generate import AgentMix, generate_trajectories


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
    assert ideal_ratio(3.0, 50.0, 10.0) == 3.0
    assert ideal_ratio(3.0, 50.0, 20.0) == 2.5
    assert ideal_ratio(1.5, 50.0, None) == 1.5


def test_what_pooling_can_give_counts_the_nics_rates():
    setup = ClusterSetup(
        layers=1, kv_bytes_per_token=1, snic_bytes_per_s=(30, 10), cnic_bytes_per_s=None, compute_quota_s=1.0,
        threads=1, cores=2, dtype="float32", transport="shm",
    )  # fmt: skip
    basic, dualpath = (measured(system, 10.0, topology="1Px4+3D", cluster=setup) for system in ("basic", "dualpath"))
    assert [run.ideal_ratio for run in compared([basic, dualpath])] == [2.0, 2.0]
    assert compared([measured("basic", 10.0, topology="1Px4+3D")])[0].ideal_ratio == 4.0


def measured(system, jct_s, digests=("a", "b"), repeat=0, failures=(), **more):
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
    place = {"topology": "1P1D", "snic_bytes": {"PE0": 30, "DE0": 10}} | more
    return run_of(replay, system=system, repeat=repeat, **place)


def test_runs_are_set_against_basics_median():
    runs = [
        *(measured("basic", jct_s, repeat=i) for i, jct_s in enumerate((40.0, 10.0, 20.0))),
        measured("dualpath", 16.0, ("a", "x")),
        measured("oracle", 10.0, ()),
    ]
    runs = compared(runs)
    dualpath, oracle = runs[3:]
    assert (dualpath.ratio_to_basic, dualpath.ideal_ratio, dualpath.ratio_to_ideal) == (1.25, 2.0, 0.625)
    assert (dualpath.ttft_p50_s, dualpath.ttst_p50_s, dualpath.tpot_p99_s) == (1.5, None, 0.1)
    assert (dualpath.hit_rate, dualpath.turns, dualpath.retries, dualpath.same_tokens_as_basic) == (0.64, 2, 1, 0.5)
    assert (oracle.ratio_to_basic, oracle.ratio_to_ideal, oracle.same_tokens_as_basic) == (2.0, None, None)
    assert [run.same_tokens_as_basic for run in runs[:3]] == [None, 1.0, 1.0]
    assert [run.ratio_to_ideal for run in runs[:3]] == [None] * 3


def test_without_basic_there_are_no_ratios_and_failures_count_what_they_abandoned():
    lost = TurnFailure(trajectory="t", round_index=1, tries=3, message="HTTP 503: no engine", abandoned_rounds=4)
    (run,) = compared([measured("dualpath", 5.0, failures=(lost,))])
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
    basic, failed_basic, dualpath, oracle = compared(runs)
    assert (basic.ratio_to_basic, failed_basic.ratio_to_basic, oracle.ratio_to_basic) == (1.0, None, None)
    assert (dualpath.ratio_to_basic, dualpath.ideal_ratio) == (2.0, 2.0)


def test_runs_are_compared_under_one_setting_only():
    runs = [
        measured("basic", 40.0, parameters={"agents": 2}),
        measured("dualpath", 20.0, parameters={"agents": 2}),
        measured("dualpath", 20.0, parameters={"agents": 4}),
        measured("dualpath", 20.0, topology="1P2D"),
    ]
    assert [run.ratio_to_basic for run in compared(runs)] == [1.0, 2.0, None, None]


def test_simulated_turns_which_have_no_digests_are_said_to_agree_with_nothing():
    runs = compared([measured("basic", 40.0, ("", "")), measured("dualpath", 20.0, ("", ""))])
    assert [run.same_tokens_as_basic for run in runs] == [None, None]
    assert runs[1].ratio_to_basic == 2.0


def test_fields_that_are_given_win_over_the_replays():
    assert measured("dualpath", 20.0, errors=3, first_round=1).errors == 3


def test_a_workload_leaves_out_the_turns_that_come_before_the_clock_starts():
    mix = AgentMix(turns=3, first_context_tokens=200, append_tokens=70, generate_tokens=4)
    agents = generate_trajectories(mix, 3, 0)
    spans = [list(agent.spans()) for agent in agents]
    warm, cold = (workload_of(agents, "generated", warmed=warmed) for warmed in (True, False))
    assert (warm.agents, warm.turns, cold.turns) == (3, 6, 9)
    assert warm.prompt_tokens == sum(span.prompt_tokens for own in spans for span in own[1:])
    assert cold.prompt_tokens == sum(span.prompt_tokens for own in spans for span in own)
    assert warm.generate_tokens == sum(round_.generate_tokens for agent in agents for round_ in agent.rounds[1:])
    longest_tokens = max(span.context_tokens for own in spans for span in own)
    assert warm.max_context_tokens == cold.max_context_tokens == longest_tokens
    assert warm.warm_up.startswith("first turns (") and cold.warm_up == "no warm-up"
