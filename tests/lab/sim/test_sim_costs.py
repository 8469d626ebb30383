"""The cost model against `spec`, the machine that is made of a cluster, and what both refuse."""

import msgspec
import pytest
from small_cluster import CALIBRATION, machine_of, simulate, some_agents

from dualpath.core.vocabulary import BLOCK_TOKENS, Role
from dualpath.lab.facts.cluster import Efficiency
from dualpath.lab.facts.cluster_files import load_cluster, preset_names
from dualpath.lab.sim.calibration import FITTED, calibration_for
from dualpath.lab.sim.costs import Calibration, step_costs
from dualpath.lab.sim.machine import MachineError, build_machine, constants_for
from dualpath.lab.sim.run import Scenario
from dualpath.lab.sim.turns import whole_blocks
from dualpath.lab.sim.workloads import TraceError, agents_of, typical_turn


@pytest.mark.parametrize("preset", preset_names())
def test_prefill_is_all_of_the_models_flops(preset: str) -> None:
    """A chunk alone on one engine: attention, projections and experts add up to `spec`'s count."""
    cluster = load_cluster(preset)
    costs = step_costs(cluster, CALIBRATION)
    hit, new = 30_016, 500
    predicted_ns = costs.attention.chunk_ns(hit, new) + new * costs.ffn_ns_per_token
    flops = cluster.model.prefill_flops(hit, new)
    assert predicted_ns == pytest.approx(flops / CALIBRATION.prefill_flop_per_s * 1e9, rel=1e-9)


@pytest.mark.parametrize("preset", preset_names())
def test_decode_reads_the_weights_and_the_kv(preset: str) -> None:
    cluster = load_cluster(preset)
    free = msgspec.structs.replace(CALIBRATION, decode_fixed_ns_per_layer=0.0, decode_request_ns_per_layer=0.0)
    costs = step_costs(cluster, free)
    for context in (20_000, 50_000):
        read_ns = cluster.model.decode_read_bytes(context, cluster.kv_dtype) / cluster.usable_hbm_bytes_per_s * 1e9
        assert costs.decode_ns(3, 3 * context) - costs.decode_ns(0, 0) == pytest.approx(3 * read_ns, rel=1e-6)
    assert costs.decode_ns(0, 0) == pytest.approx(cluster.decode_weight_bytes / cluster.usable_hbm_bytes_per_s * 1e9)


def test_decode_steps_stay_near_published_latencies() -> None:
    """aiconfigurator's for DeepSeek-V3.2: the slope from 16 to 128 requests of 32K, whose constant is taken from it."""
    costs = step_costs(load_cluster("ds660b-2p4d"), FITTED)
    slope_ns = (costs.decode_ns(128, 128 * 32_768) - costs.decode_ns(16, 16 * 32_768)) / 112
    assert slope_ns == pytest.approx((102e6 - 29e6) / 112, rel=0.05)


def test_a_machine_has_the_clusters_engines_nodes_and_groups() -> None:
    machine = build_machine(load_cluster("ds660b-48p96d"), FITTED)
    prefill, decode = machine.of_role(Role.PREFILL), machine.of_role(Role.DECODE)
    assert (len(prefill), len(decode), machine.nodes) == (384, 768, 144)
    assert len({facts.group for facts in prefill}) == len({facts.group for facts in decode}) == 24
    assert {facts.group for facts in prefill}.isdisjoint(facts.group for facts in decode)
    assert [facts.engine for facts in machine.engines] == list(range(1152))
    buffers = 8 * prefill[0].buffer_blocks * BLOCK_TOKENS * machine.costs.kv_bytes_per_token
    assert 0.999 * 80e9 < buffers <= 80e9


def test_weights_that_leave_no_room_are_refused() -> None:
    cluster = msgspec.structs.replace(load_cluster("qwen32b-1p2d"), weight_bytes_per_parameter=4.0)
    with pytest.raises(MachineError, match="after the weights"):
        build_machine(cluster, FITTED)


def test_alpha_and_beta_are_three_and_five_seconds_of_turns() -> None:
    machine = machine_of("ds660b-2p4d")
    constants = constants_for(machine, 32_000, 31_744)
    assert constants.alpha_tokens * machine.costs.kv_bytes_per_token == pytest.approx(
        3 * machine.snic_bytes_per_s[0], rel=1e-3
    )
    turn_ns = machine.costs.attention.chunk_ns(31_744, 256) + 256 * machine.costs.ffn_ns_per_token
    assert constants.beta_tokens / 32_000 * turn_ns == pytest.approx(5e9, rel=1e-3)


def test_model_execution_takes_its_share_of_the_compute_nics() -> None:
    agents = some_agents(20, 5)
    busy = msgspec.structs.replace(CALIBRATION, collective_share=0.9)
    plain, slowed = (
        simulate(machine_of("qwen32b-1p2d", calibration=calibration), "dualpath", agents).measured
        for calibration in (CALIBRATION, busy)
    )
    assert sum(slowed.ttst_s) > 3 * sum(plain.ttst_s)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefill_flop_per_s": 0.0},
        {"snic_efficiency": 1.2},
        {"copy_submission_ns": -1.0},
        {"collective_share": 1.0},
    ],
)
def test_senseless_constants_are_refused(wrong: "dict[str, float]") -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Calibration(**wrong)


def test_a_cluster_that_states_nothing_gets_the_fitted_constants() -> None:
    cluster = load_cluster("ds27b-1p1d")
    assert calibration_for(cluster) == FITTED
    stated = msgspec.structs.replace(cluster, efficiency=Efficiency(compute=0.5))
    assert calibration_for(stated) == msgspec.structs.replace(FITTED, prefill_flop_per_s=stated.prefill_flop_per_s)


def test_whole_blocks() -> None:
    assert [whole_blocks(tokens) for tokens in (-1, 0, 63, 64, 129)] == [0, 0, 0, 64, 128]


def test_the_typical_turn_is_the_mean_of_what_agents_do() -> None:
    agents = agents_of(["32K"], 500)
    prompts = [agents.turn(agent, index).prompt_tokens for agent in range(500) for index in range(agents.turns[agent])]
    prompt, kept = typical_turn(agents)
    assert prompt == pytest.approx(sum(prompts) / len(prompts))
    assert 0 < kept < prompt


def test_questions_that_make_no_sense() -> None:
    cluster, agents = load_cluster("ds27b-1p1d"), agents_of(["32K"], 2)
    with pytest.raises(ValueError, match="unknown system 'fast'"):
        Scenario(cluster=cluster, agents=agents, system="fast")
    with pytest.raises(TraceError, match=r"no trace 'nothing.jsonl'"):
        agents_of(["nothing.jsonl"])
