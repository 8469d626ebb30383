"""One simulated cluster against closed forms, and what must hold whatever the costs are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_world import BLOCK_BYTES, FREE_MOVE, KV_BYTES, LAYERS, MS, agent, agents, busy_machine, machine, setup

from dualpath.core.policy import SYSTEMS
from dualpath.core.vocabulary import Side
from dualpath.prediction.machine import MoveCost, StorageCost, TransportCost
from dualpath.prediction.nic import BURST_NS
from dualpath.prediction.predict import simulate

CONTEXT = 1024 + 16  # the warm-up's prompt and answer: 16 blocks and 15 tokens with KV


def lone_agent():
    """One turn: 16 blocks of hits, 80 tokens to compute, then 11 steps. Nothing new fills a block but one."""
    return (agent((1024, 16), (64, 12)),)


def test_a_lone_turn_takes_its_prefill_and_its_steps():
    _, (turn,), jct_ns = simulate(setup(machine(), lone_agent()))
    assert (turn.prompt_tokens, turn.hit_tokens) == (CONTEXT + 64, 1024)
    prefill_ns = LAYERS * (1 * MS + 80 * 0.05 * MS)
    assert turn.first_token_ns == pytest.approx(prefill_ns, abs=100)
    assert turn.second_token_ns - turn.first_token_ns == pytest.approx(6 * MS, abs=100)
    assert jct_ns == pytest.approx(prefill_ns + 11 * 6 * MS, abs=1000)


def test_the_storage_nic_reads_at_its_rate_and_only_hits():
    rate = 40_000_000
    cluster, (turn,), _ = simulate(setup(machine(), lone_agent(), snic_bytes_per_s=rate))
    read_ns = 16 * BLOCK_BYTES * 1e9 / rate - BURST_NS
    assert turn.read_ns == pytest.approx(read_ns, rel=1e-3)
    assert [nic.rx.moved_bytes for nic in cluster.snics] == [16 * BLOCK_BYTES, 0]


def test_two_storage_nics_read_twice_as_fast_where_both_may():
    crowd = agents(8)
    jct_ns = {
        system: simulate(setup(machine(), crowd, system=system, snic_bytes_per_s=20_000_000))[2]
        for system in ("basic", "dualpath", "oracle")
    }
    assert jct_ns["basic"] / jct_ns["dualpath"] == pytest.approx(2, rel=0.1)
    assert jct_ns["oracle"] < jct_ns["dualpath"] / 3


def test_the_compute_nic_bounds_the_prefill():
    """Layerwise, from the PE buffer: a layer's hits come in and its KV goes out, both over the PE's CNIC."""
    rate = 50_000_000
    _, (turn,), _ = simulate(setup(machine(), lone_agent(), cnic_bytes_per_s=rate))
    sent_bytes = (2 * 1024 + 80) * KV_BYTES  # PE buffer → device, and everything → DE buffer, out of one lane
    assert turn.first_token_ns == pytest.approx(sent_bytes * 1e9 / rate, rel=0.05)


def test_whole_prompts_load_compute_and_ship_one_after_another():
    rate = 50_000_000
    layerwise, whole = (
        simulate(setup(machine(), lone_agent(), system=system, cnic_bytes_per_s=rate))[1][0].first_token_ns
        for system in ("basic-layerwise", "basic")
    )
    serial_ns = (2 * 1024 + 80) * KV_BYTES * 1e9 / rate + LAYERS * 5 * MS
    assert whole == pytest.approx(serial_ns, rel=0.02)
    assert layerwise < whole


def test_a_turn_ends_when_its_blocks_are_durable():
    waits = machine(storage=StorageCost(read_ns=0, write_ns=0, write_wait_ns=500 * MS, read_threads=2, write_threads=2))
    _, (turn,), jct_ns = simulate(setup(waits, lone_agent()))
    # The prompt's 17th block is written beside decoding; it outlives it.
    assert jct_ns == pytest.approx(turn.first_token_ns + 500 * MS, rel=0.01)
    assert turn.last_token_ns < jct_ns


def test_a_block_that_fills_while_decoding_is_written_then():
    waits = machine(storage=StorageCost(read_ns=0, write_ns=0, write_wait_ns=500 * MS, read_threads=2, write_threads=2))
    *_, jct_ns = simulate(setup(waits, (agent((1024, 16), (20, 40)),)))  # 1060 prompt tokens, block 17 ends at 1088
    filled_ns = LAYERS * (1 + 36 * 0.05) * MS + 28 * 6 * MS  # after 29 generated tokens, the newest without KV
    assert jct_ns == pytest.approx(filled_ns + 500 * MS, rel=0.01)


def test_shipping_hides_behind_computing_where_it_is_shorter():
    layer_bytes, compute_ns = 1104 * KV_BYTES // LAYERS, LAYERS * 5 * MS
    for byte_ns, expected_ns in ((1.0, compute_ns), (2.0, LAYERS * layer_bytes * 2.0)):
        put = MoveCost(byte_ns=byte_ns, chunk_ns=0)
        rates = machine(transports={"shm": TransportCost(pull=FREE_MOVE, put=put)})
        _, (turn,), _ = simulate(setup(rates, lone_agent()))
        assert turn.first_token_ns == pytest.approx(expected_ns, rel=0.01)


def test_busy_cores_make_turns_slower():
    crowd = agents(6)
    few, many = (
        simulate(setup(busy_machine(cores=cores), crowd, prefill_engines=2, decode_engines=2))[2] for cores in (1, 4)
    )
    assert few > 1.5 * many


def test_agents_pause_and_wait_for_their_subagents():
    helper = agent((64, 4), name="helper")
    one = agent((1024, 16), (64, 12), name="a", gap_s=3.0, subagents=(helper,))
    _, turns, jct_ns = simulate(setup(machine(), (one,)))
    assert [turn.trajectory for turn in turns] == ["a", "helper"]
    assert turns[0].sent_ns == 3_000 * MS
    assert turns[1].sent_ns >= turns[0].last_token_ns and turns[1].hit_tokens == 0
    assert jct_ns > turns[1].last_token_ns - 1


def test_the_kernel_keeps_rates_for_nothing():
    moving = machine(transports={"shm": TransportCost(pull=FREE_MOVE, put=MoveCost(byte_ns=0, chunk_ns=10 * MS))})
    paced, free = (
        simulate(setup(moving, lone_agent(), cnic_bytes_per_s=400_000_000, paced=paced))[1][0].first_token_ns
        for paced in (True, False)
    )
    assert paced > 2 * free


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(SYSTEMS)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 5),
    st.sampled_from([None, 30_000_000]),
    st.sampled_from([None, 300_000_000]),
)
def test_every_turn_is_answered_in_order_whatever_the_cluster(
    system: str, prefill: int, decode: int, count: int, snic: int | None, cnic: int | None
):
    crowd = agents(count)
    made = setup(
        busy_machine(), crowd, system=system, prefill_engines=prefill, decode_engines=decode,
        snic_bytes_per_s=snic, cnic_bytes_per_s=cnic,
    )  # fmt: skip
    cluster, turns, jct_ns = simulate(made)
    assert {(turn.trajectory, turn.round_index) for turn in turns} == {(one.id, i) for one in crowd for i in (1, 2)}
    for turn in turns:
        stages = (turn.sent_ns, turn.arrived_ns, turn.placed_ns, turn.allocated_ns, turn.read_ns, turn.first_out_ns)
        assert list(stages) == sorted(stages)
        assert turn.first_out_ns <= turn.first_token_ns <= turn.second_token_ns <= turn.last_token_ns <= jct_ns
        assert turn.generated_tokens == turn.generate_tokens
        assert sum(leg.blocks for leg in turn.legs) == turn.hit_blocks
    read_blocks = sum(leg.blocks for turn in turns for leg in turn.legs)
    assert sum(nic.rx.moved_bytes for nic in cluster.snics) == read_blocks * BLOCK_BYTES
    if system.startswith("basic"):
        assert all(leg.side is Side.PE for turn in turns for leg in turn.legs)


def test_the_same_setup_gives_the_same_run():
    made = setup(busy_machine(), agents(6), decode_engines=2, snic_bytes_per_s=30_000_000)
    one, other = (simulate(made) for _ in range(2))
    assert one[2] == other[2]
    assert [turn.last_token_ns for turn in one[1]] == [turn.last_token_ns for turn in other[1]]
