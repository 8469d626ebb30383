"""Plans: demands against the paper's link traffic, bounds by hand, splits, refusals, and what the report says."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dualpath.cli import main
from dualpath.lab.facts.bottleneck import bottleneck_free
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.facts.hardware import GPUS
from dualpath.lab.facts.models import MODELS
from dualpath.lab.planning import PlanError, TurnLoad, plan_capacity, turn_load
from dualpath.lab.planning.decode import decode_rate, step_s
from dualpath.lab.planning.demand import balanced_share, demands, prefill_flops
from dualpath.lab.planning.plan import load_of
from dualpath.lab.planning.turn_load import trajectory_load
from dualpath.lab.report.capacity_plan import plan_sentences, resource_table, split_table
from dualpath.results.online import Slo
from dualpath.spec.topology import Topology
from dualpath.traces.trajectory import Round, Trajectory
from dualpath.traces.turn_table import TurnTable

LOAD = TurnLoad(
    name="test",
    turns_per_agent=10,
    hit_tokens=32_768,
    miss_tokens=400,
    miss_pairs=400 * 32_768 + 400 * 401 / 2,
    generate_tokens=100,
    gap_s=0,
    total_tokens=40_000,
    max_context_tokens=41_000,
)
CLUSTER = load_cluster("ds660b-2p4d")


def changed(cluster, efficiency=None, **fields):
    if efficiency:
        fields["efficiency"] = msgspec.structs.replace(cluster.efficiency, **efficiency)
    return msgspec.structs.replace(cluster, **fields)


def by_resource(cluster, load, share):
    rate = decode_rate(cluster, load, 0.05)
    return {demand.resource: demand for demand in demands(cluster, load, rate, share)}


def test_decode_steps_are_the_published_ones():
    """aiconfigurator: DeepSeek-V3.2 on H100, expert parallelism of 64, context 32K."""
    cluster = changed(CLUSTER, gpu=GPUS["h100"], topology=Topology(2, 8, 8), decode_group_nodes=8)
    for batch, published_s in ((16, 0.029), (32, 0.039), (64, 0.059), (128, 0.102)):
        assert step_s(cluster, batch, 32_768) == pytest.approx(published_s, rel=0.04)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.05, 0.95))
def test_hit_traffic_is_that_of_the_bottleneck_analysis(prefill_nodes, decode_nodes, dram_share):
    """With hits alone and every SNIC equally busy, links are used as in the bottleneck-free formulas."""
    cluster = changed(CLUSTER.with_nodes(prefill_nodes, decode_nodes), efficiency={"dram": dram_share})
    hits = msgspec.structs.replace(LOAD, miss_tokens=0, miss_pairs=0, generate_tokens=0)
    asked = by_resource(cluster, hits, prefill_nodes / (prefill_nodes + decode_nodes))
    snic = cluster.usable_snic_bytes_per_s
    full_turns_per_s = (prefill_nodes + decode_nodes) * snic / asked["PE CNIC write"].per_turn
    free = bottleneck_free(
        prefill_nodes, decode_nodes, 8, snic / cluster.cnic_bytes_per_s, cluster.cnic_bytes_per_s,
        cluster.usable_dram_bytes_per_s,
    )  # fmt: skip
    for load in free.loads:
        assert full_turns_per_s / asked[load.link].turns_per_s == pytest.approx(load.utilisation), load.link
    for side in ("PE", "DE"):
        assert asked[f"{side} SNIC read"].turns_per_s == pytest.approx(full_turns_per_s)


def test_misses_and_generations_by_hand():
    kv = CLUSTER.kv_bytes_per_token
    hit, miss, made = 32_768 * kv, 400 * kv, 100 * kv
    asked = by_resource(CLUSTER, LOAD, 0.25)
    assert asked["PE CNIC read"].per_turn == pytest.approx(0.25 * hit + 0.25 * hit + miss)
    assert asked["DE CNIC read"].per_turn == pytest.approx(0.75 * hit + hit + miss + made)
    assert asked["DE CNIC write"].per_turn == pytest.approx(0.25 * hit + miss + hit + miss + made)
    assert asked["DE SNIC write"].per_turn == pytest.approx(miss + made)
    assert asked["DE DRAM"].per_turn == pytest.approx(2 * 0.75 * hit + 0.25 * hit + hit + 3 * miss + 2 * made)
    assert asked["prefill compute"].per_turn == pytest.approx(CLUSTER.model.prefill_flops(32_768, 400))
    assert asked["prefill compute"].capacity_per_s == pytest.approx(16 * 0.385 * 989e12)


def test_basic_is_bound_by_the_prefill_snics_and_dual_path_pools_them_all():
    fast = changed(load_cluster("ds27b-1p2d"), efficiency={"compute": 1.0})
    plan = plan_capacity(fast, LOAD)
    snic_turns_per_s = 43e9 / (32_768 * fast.kv_bytes_per_token)
    assert plan.basic.binding == "PE SNIC read"
    assert plan.basic.turns_per_s == pytest.approx(snic_turns_per_s)
    assert plan.dualpath.binding == "PE SNIC read + DE SNIC read"
    assert plan.gain == pytest.approx(3)
    assert plan.basic.agents_per_s == pytest.approx(snic_turns_per_s / 10)


def test_slow_compute_leaves_nothing_to_gain():
    slow = changed(CLUSTER, efficiency={"compute": 0.02})
    plan = plan_capacity(slow, LOAD)
    assert (plan.basic.binding, plan.dualpath.binding) == ("prefill compute", "prefill compute")
    assert plan.gain == pytest.approx(1)
    assert [case.gain for case in plan.sensitivity] == pytest.approx([1, 1])


def test_in_between_the_gain_is_the_snics_time_over_computes():
    plan = plan_capacity(CLUSTER, LOAD)
    read_s = 32_768 * 48_068 / (2 * 43e9)
    compute_s = CLUSTER.model.prefill_flops(32_768, 400) / (16 * 0.385 * 989e12)
    assert plan.gain == pytest.approx(read_s / compute_s)
    assert plan.dualpath.binding == "prefill compute"


@pytest.mark.parametrize("pair", [("ds27b-1p1d", "ds27b-2p1d"), ("ds27b-2p1d", "ds27b-1p2d")])
def test_pairs_with_equal_storage_bandwidth_tie(pair):
    """§10: Ours 1P1D ≈ Basic 2P1D, Ours 2P1D ≈ Ours 1P2D."""
    load = load_of(["32K"])
    first, second = (plan_capacity(load_cluster(name), load) for name in pair)
    other = second.basic if pair[0] == "ds27b-1p1d" else second.dualpath
    assert first.dualpath.turns_per_s == pytest.approx(other.turns_per_s)


@settings(deadline=None, derandomize=True)
@given(st.floats(0, 1))
def test_no_other_share_of_reads_is_faster(share):
    cluster = changed(CLUSTER.with_nodes(1, 5), cnic_bytes_per_s=4e9, dram_bytes_per_s=100e9)
    rate = decode_rate(cluster, LOAD, 0.05)

    def turns_per_s(at):
        return min(demand.turns_per_s or float("inf") for demand in demands(cluster, LOAD, rate, at))

    assert turns_per_s(share) <= turns_per_s(balanced_share(cluster, LOAD, rate)) * (1 + 1e-6)


def test_every_split_is_the_plan_of_that_cluster_and_the_best_is_the_best():
    plan = plan_capacity(CLUSTER, LOAD)
    assert [(split.prefill_nodes, split.decode_nodes) for split in plan.splits] == [(p, 6 - p) for p in range(1, 6)]
    for split in plan.splits[1:4]:
        alone = plan_capacity(CLUSTER.with_nodes(split.prefill_nodes, split.decode_nodes), LOAD)
        assert split.dualpath_agents_per_s == pytest.approx(alone.dualpath.agents_per_s)
        assert split.basic_agents_per_s == pytest.approx(alone.basic.agents_per_s)
    assert plan.best_split.dualpath_agents_per_s == max(split.dualpath_agents_per_s for split in plan.splits)
    # DeepSeek-V3.2's experts need two nodes of a role.
    assert plan.splits[0].dualpath_agents_per_s == plan.splits[4].dualpath_agents_per_s == 0


def test_the_papers_working_sets_lie_between_unloaded_and_the_slo():
    load = load_of(["64K"])
    for aps, published_bytes in ((0.1, 69e9), (0.45, 681e9)):
        working = plan_capacity(CLUSTER, load, agents_per_s=aps).working_set
        assert working.bytes_unloaded < published_bytes < working.bytes_at_slo
    assert working.dram_buffer_bytes == 480e9


def test_a_turn_load_by_hand():
    table = TurnTable.from_lengths([np.array([100, 30]), np.array([10])], [np.array([29, 1]), np.array([5])])
    load = turn_load("hand", table)
    # Second turn: context 129, of which the last token's KV was never computed: two blocks; 159 - 128 are computed.
    assert load.hit_tokens == pytest.approx(128 / 3)
    assert load.miss_tokens == pytest.approx((100 + 31 + 10) / 3)
    assert load.miss_pairs == pytest.approx((5050 + 31 * 128 + 31 * 16 + 55) / 3)
    assert (load.turns_per_agent, load.max_context_tokens) == (1.5, 160)
    assert load.total_tokens == pytest.approx((160 + 15) / 2)


def test_subagents_are_turns_of_their_parents_agent():
    nested = Trajectory(id="b", rounds=(Round(append_tokens=7, generate_tokens=1),) * 2)
    parent = Trajectory(id="a", rounds=(Round(append_tokens=1, generate_tokens=1, subagents=(nested,)),))
    assert trajectory_load("x", [parent]).turns_per_agent == 3


def test_prefill_flops_of_a_mean_turn_are_the_mean_of_every_turns():
    table = TurnTable.from_lengths([np.array([9000, 300, 500])], [np.array([50, 50, 50])])
    load = turn_load("x", table)
    model = MODELS["qwen2.5-32b"]
    cluster = changed(CLUSTER, model=model)
    kept = (0, 9049 // 64 * 64, 9399 // 64 * 64)
    exact = [model.prefill_flops(hit, prompt - hit) for hit, prompt in zip(kept, (9000, 9350, 9900), strict=True)]
    assert prefill_flops(cluster, load) == pytest.approx(np.mean(exact))


@pytest.mark.parametrize(
    ("cluster", "load", "slo", "message"),
    [
        (CLUSTER.with_nodes(1, 5), LOAD, Slo(), "weights of deepseek-v3.2 don't fit a prefill engine's h800"),
        (CLUSTER, msgspec.structs.replace(LOAD, max_context_tokens=10**6), Slo(), "the longest context .1,000,000 tok"),
        (CLUSTER, LOAD, Slo(tpot_s=0.001), "TPOT of 1 ms can't be held: one request alone takes"),
        (CLUSTER, LOAD, Slo(ttft_s=0.01), "TTFT of 0.01 s can't be held: the mean turn alone takes 0.1 s"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(cluster, load, slo, message):
    with pytest.raises(PlanError, match=message):
        plan_capacity(cluster, load, slo)


def said(plan):
    return "\n".join(plan_sentences(json.loads(msgspec.json.encode(plan))))


def drawn(*tables):
    console = Console(width=160)
    with console.capture() as captured:
        console.print(*tables)
    return captured.get()


def test_the_report_says_what_binds_and_by_how_much():
    plan = plan_capacity(CLUSTER, LOAD)
    text = said(plan)
    assert "limited by PE SNIC read" in text
    assert "limited by prefill compute" in text
    assert f"{plan.gain:.2f} times basic" in text
    assert "upper bounds" in text
    assert "PE CNIC write is full below" in text
    alone = plan_capacity(load_cluster("ds27b-1p1d"), LOAD)
    assert "Of these nodes, 1P1D is the best division" in said(alone)


def test_the_report_of_a_cluster_outside_the_range_says_so():
    outside = changed(load_cluster("ds27b-2p1d").with_nodes(9, 1))
    text = said(plan_capacity(outside, LOAD))
    assert "at 9.00 they can't: DE CNIC write would need" in text
    assert "would be the best division" in text


def test_the_tables_have_every_resource_and_the_splits_around_the_best():
    plan = json.loads(msgspec.json.encode(plan_capacity(load_cluster("ds660b-48p96d"), load_of(["64K"]))))
    resources = drawn(resource_table(plan))
    assert all(demand["resource"] in resources for demand in plan["basic"]["demands"])
    splits = drawn(split_table(plan))
    best = plan["best_split"]
    assert f"{best['prefill_nodes']}P{best['decode_nodes']}D  (best)" in splits
    assert "48P96D  (now)" in splits
    assert sum("D " in line for line in splits.splitlines()) in (7, 8)  # seven, and the present one if it is far off


def test_the_command_prints_the_plan_and_writes_it(tmp_path, capsys):
    assert main(["plan", "ds27b-1p1d", "--trace", "32K", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["cluster"] == "ds27b-1p1d"
    assert f"{document['gain']:.2f} times" in " ".join(printed.split())
    assert "PE SNIC read" in printed


def test_the_command_takes_recorded_traces_and_other_models(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    lines = [(0, 6400, [*range(13)]), (9000, 7000, [*range(12), 50, 51])]
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": at, "input_length": n, "output_length": 40, "hash_ids": ids})
            for at, n, ids in lines
        )
    )
    assert main(["plan", "ds27b-1p1d", "--model", "gpt-oss-120b", "--trace", str(trace)]) == 0
    assert "gpt-oss-120b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "ds1b"], "no cluster 'ds1b'"),
        (["plan", "ds27b-1p1d", "--trace", "nothing.json"], "no trace 'nothing.json'"),
        (["plan", "ds27b-1p1d", "--model", "gpt-9"], "no model 'gpt-9'"),
        (["plan", "ds660b-2p4d", "--model", "qwen2.5-32b"], "does not fit|don't fit"),
    ],
)
def test_the_command_refuses_with_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(part in error for part in message.split("|"))
