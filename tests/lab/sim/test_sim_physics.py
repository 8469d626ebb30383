"""What must hold whatever the model: bytes, Little's law, one request by hand, sameness, and core's own commands."""

import subprocess
import sys

import numpy as np
import pytest
from small_cluster import machine_of, one_agent, simulate, simulator_of, some_agents

from dualpath.core.journal import replay
from dualpath.core.systems import SYSTEMS, find_system
from dualpath.core.vocabulary import BLOCK_TOKENS, Role
from dualpath.lab.sim.measure import Measurements
from dualpath.lab.sim.turns import LiveTurn

PRESETS = ("ds27b-1p1d", "qwen32b-1p2d", "ds660b-2p4d")


def columns(measured: Measurements) -> bytes:
    return b"".join(bytes(c) for c in (measured.ended_s, measured.ttft_s, measured.ttst_s, measured.tpot_s))


@pytest.mark.parametrize("system", [name for name in SYSTEMS.names() if name != "oracle"])
@pytest.mark.parametrize("exact", [False, True])
def test_bytes_are_conserved(system: str, exact: bool) -> None:
    machine = machine_of("qwen32b-1p2d")
    agents = some_agents(12, 6)
    run = simulate(machine, system, agents, exact=exact)
    kv_bytes = machine.costs.kv_bytes_per_token
    statistics = run.scheduler.statistics()
    blocks = {role: statistics.get(f"{role}_read_blocks", 0) for role in ("pe", "de")}
    by_role = {
        role: sum(run.storage.read_bytes[node] for node in {facts.node for facts in machine.of_role(role)})
        for role in Role
    }
    # Storage reads what core commanded, on the side it commanded, and all that hit.
    assert by_role[Role.PREFILL] == blocks["pe"] * BLOCK_TOKENS * kv_bytes
    assert by_role[Role.DECODE] == blocks["de"] * BLOCK_TOKENS * kv_bytes
    assert sum(by_role.values()) == run.measured.hit_tokens * kv_bytes > 0
    # Whatever a CNIC reads, one writes.
    read, write = (np.array(run.fabric.read_bytes), np.array(run.fabric.write_bytes))
    assert read.sum() == write.sum()
    # Every DE gets each prompt's missing tokens and PE-side hits over the network, and copies the whole prompt.
    prefill = [facts.engine for facts in machine.of_role(Role.PREFILL)]
    decode = [facts.engine for facts in machine.of_role(Role.DECODE)]
    computed = run.measured.prompt_tokens - run.measured.hit_tokens
    shipped_bytes = (computed + blocks["pe"] * BLOCK_TOKENS) * kv_bytes
    copied_bytes = run.measured.prompt_tokens * kv_bytes
    rounding = 0 if not exact else machine.costs.layers * 2 * run.prefill.chunks  # a layer's bytes are whole
    assert shipped_bytes + copied_bytes - rounding <= write[decode].sum() <= shipped_bytes + copied_bytes
    # A PE takes in every hit token at least once, more often where its prompt was cut into chunks.
    assert write[prefill].sum() >= run.measured.hit_tokens * kv_bytes - rounding
    # What was computed is made durable, but for each context's unfinished block.
    written = sum(run.storage.write_bytes)
    assert written % (BLOCK_TOKENS * kv_bytes) == 0
    finals = agents.table.final_context_tokens
    assert written == sum((int(final) - 1) // BLOCK_TOKENS for final in finals) * BLOCK_TOKENS * kv_bytes


@pytest.mark.parametrize("system", ["basic", "dualpath", "dualpath-split"])
@pytest.mark.parametrize("exact", [False, True])
def test_of_layers_with_a_window_only_what_it_sees_moves(system: str, exact: bool) -> None:
    """gpt-oss-120b: half of its layers see 128 tokens."""
    machine = machine_of("qwen32b-1p2d", model="gpt-oss-120b")
    kv = machine.costs.kv
    turns: list[LiveTurn] = []
    simulator = simulator_of(machine, system, exact=exact)
    simulator.on_turn = turns.append
    simulator.arrive(some_agents(12, 6))
    simulator.run()
    hit_bytes = sum(kv.hit_bytes(turn.hit_tokens) for turn in turns)
    whole_bytes = simulator.measured.hit_tokens * kv.bytes_per_token
    assert 0 < sum(simulator.storage.read_bytes) == hit_bytes < 0.52 * whole_bytes
    assert simulator.unread_bytes == whole_bytes - hit_bytes
    assert sum(simulator.fabric.read_bytes) == sum(simulator.fabric.write_bytes)
    # A prompt is copied to its decode engine's device as far as it is seen; what was computed is shipped whole.
    copied = sum(kv.seen_bytes(0, turn.prompt_tokens, turn.prompt_tokens, BLOCK_TOKENS) for turn in turns)
    computed = sum(turn.prompt_tokens - turn.hit_tokens for turn in turns) * kv.bytes_per_token
    by_pe = sum(kv.seen_bytes(0, turn.pe_tokens, turn.hit_tokens) for turn in turns)
    decode = [facts.engine for facts in machine.of_role(Role.DECODE)]
    received = sum(simulator.fabric.write_bytes[engine] for engine in decode)
    rounding = machine.costs.layers * 2 * simulator.prefill.chunks if exact else 0
    assert copied + computed + by_pe - rounding <= received <= copied + computed + by_pe
    assert sum(simulator.storage.write_bytes) % (BLOCK_TOKENS * kv.bytes_per_token) == 0, "storage has whole blocks"


@pytest.mark.parametrize("system", list(SYSTEMS.names()))
def test_littles_law(system: str) -> None:
    measured = simulate(machine_of("ds27b-1p1d"), system, some_agents(30, 8)).measured
    assert measured.finished == 240
    assert measured.turn_ns / 1e9 == pytest.approx(sum(measured.latency_s), rel=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("system", ["dualpath", "basic", "oracle"])
def test_one_agent_in_closed_form(system: str, exact: bool) -> None:
    """Alone in the cluster, every stage of the second turn is a formula."""
    machine = machine_of("ds660b-2p4d")
    costs = machine.costs
    run = simulate(machine, system, one_agent((6_400, 65), (300, 50)), exact=exact)
    prompt, hit, generated = 6_765, 6_464 // 64 * 64, 50
    new = prompt - hit
    cnic_ns = 1e9 / machine.cnic_bytes_per_s[0] * costs.kv_bytes_per_token
    group = machine.nodes and 4  # engines of the prefill group: 2 nodes of 2
    attention_ns = costs.attention.chunk_ns(hit, new)
    compute_ns = costs.prefill_ns(attention_ns, new / group)
    read_ns = hit * costs.kv_bytes_per_token / machine.snic_bytes_per_s[0] * 1e9 + machine.read_latency_ns
    if system == "oracle":
        read_ns = load_ns = ship_ns = copy_ns = 0.0
    elif system == "dualpath":
        load_ns = hit * cnic_ns / costs.layers
        ship_ns = prompt * cnic_ns / costs.layers  # nobody queues: the PE side reads
        copy_ns = prompt * cnic_ns
    else:
        blocks_ns = costs.copy_ns_per_block
        load_ns = max(hit * cnic_ns, hit // 64 * blocks_ns) + prompt * cnic_ns  # then the transfer, within the step
        ship_ns = 0.0
        copy_ns = max(prompt * cnic_ns, -(-prompt // 64) * blocks_ns)
    ttft_ns = read_ns + load_ns + compute_ns
    first_step_ns = costs.decode_ns(1, prompt + 1)
    assert run.measured.ttft_s[1] * 1e9 == pytest.approx(ttft_ns, rel=1e-3)
    assert run.measured.ttst_s[1] * 1e9 == pytest.approx(ship_ns + copy_ns + first_step_ns, rel=2e-3)
    middle_ns = costs.decode_ns(1, prompt + generated / 2)
    assert run.measured.tpot_s[1] * 1e9 == pytest.approx(middle_ns, rel=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_two_runs_are_identical_to_the_byte(preset: str) -> None:
    runs = []
    for _ in range(2):
        lines: list[bytes] = []
        run = simulate(machine_of(preset), "dualpath", some_agents(20, 6), journal=lines.append)
        runs.append((b"".join(lines), columns(run.measured), list(run.storage.read_bytes), run.events.posted))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("system", ["basic", "dualpath", "dualpath-split"])
def test_a_recorded_run_replays_through_core(system: str) -> None:
    lines: list[bytes] = []
    run = simulate(machine_of("ds660b-2p4d"), system, some_agents(20, 5), journal=lines.append)
    report = replay(lines)
    assert report.difference is None
    assert report.entries == len(lines) - 1 > 5 * run.measured.finished
    # The journal does hold the commands: another policy's run of the same inputs differs.
    header = lines[0].replace(
        b'"read_path":"' + find_system(system).policy.read_path.encode(), b'"read_path":"alternate'
    )
    assert replay([header, *lines[1:]]).difference is not None


def test_a_journal_changes_nothing() -> None:
    machine, agents = machine_of("ds27b-1p1d"), some_agents(10, 5)
    plain, journaled = (
        simulate(machine, "dualpath", agents, **options) for options in ({}, {"journal": lambda line: None})
    )
    assert columns(plain.measured) == columns(journaled.measured)


def test_oracle_is_never_slower_and_dualpath_reads_with_every_node() -> None:
    machine, agents = machine_of("ds660b-2p4d"), some_agents(60, 10, first=30_000)
    runs = {system: simulate(machine, system, agents) for system in ("basic", "dualpath", "oracle")}
    jct = {system: run.events.now for system, run in runs.items()}
    assert jct["oracle"] <= jct["dualpath"] < jct["basic"]
    assert all(runs["dualpath"].storage.read_bytes)
    decode_nodes = {facts.node for facts in machine.of_role(Role.DECODE)}
    assert not any(runs["basic"].storage.read_bytes[node] for node in decode_nodes)
    assert not any(runs["oracle"].storage.read_bytes)


def test_agents_pause_and_start_when_told() -> None:
    machine = machine_of("ds27b-1p1d")
    agents = one_agent((1_000, 1), (100, 1))
    pausing = type(agents).of_templates(agents.table.with_gaps(np.array([0, 7_000_000_000])))
    plain = simulate(machine, "dualpath", agents)
    run = simulator_of(machine, "dualpath")
    run.arrive(pausing, [5_000_000_000])
    run.run()
    assert run.events.now == plain.events.now + 12_000_000_000


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys, dualpath.lab.sim, dualpath.lab.sim.run, dualpath.lab.paper.items; "
        "print([name for name in ('torch', 'transformers', 'zmq') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
