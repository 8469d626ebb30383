"""Engines die, NICs slow down: nothing is lost, nothing is held, and the numbers say what happened."""

import pytest
from small_cluster import machine_of, simulator_of, some_agents

from dualpath.core.audit import audit
from dualpath.core.vocabulary import Role
from dualpath.lab.sim.faults import Fault, plan_faults
from dualpath.lab.sim.simulator import Simulator


def with_faults(system: str, *faults: Fault, preset: str = "ds660b-2p4d") -> Simulator:
    run = simulator_of(machine_of(preset), system)
    plan_faults(run, faults)
    run.arrive(some_agents(30, 6))
    run.run()
    audit(run.scheduler.life)
    return run


@pytest.mark.parametrize("system", ["basic", "dualpath", "dualpath-split", "oracle"])
@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("at_s", [0.5, 3.0, 9.0])
def test_a_lost_engine_costs_time_and_no_turn(system: str, role: Role, at_s: float) -> None:
    machine = machine_of("ds660b-2p4d")
    engine = machine.of_role(role)[1].engine
    run = with_faults(system, Fault(at_s=at_s, kind="engine_lost", target=engine))
    measured = run.measured
    assert measured.finished == measured.submitted == 180
    assert not measured.failed
    assert measured.retries > 0
    # What a lost decode engine had generated is kept, so the clients see every token once.
    assert measured.generated_tokens == some_agents(30, 6).table.generate_tokens.sum()
    assert all(facts.engine != engine for facts in run.scheduler.engines())
    assert all(held.engine != engine for held in run.scheduler.held())


def test_losing_the_only_decode_node_fails_every_turn() -> None:
    machine = machine_of("ds27b-1p1d")
    faults = [Fault(at_s=2.0, kind="engine_lost", target=f.engine) for f in machine.of_role(Role.DECODE)]
    run = with_faults("dualpath", *faults, preset="ds27b-1p1d")
    assert sum(run.measured.failed.values()) == 30  # every agent ends with a failed turn
    assert not run.lives


def test_a_slow_nic_stretches_reads_under_way() -> None:
    plain = with_faults("basic")
    slowed = with_faults("basic", Fault(at_s=10.0, kind="snic", target=0, factor=0.02))
    mended = with_faults(
        "basic",
        Fault(at_s=10.0, kind="snic", target=0, factor=0.02),
        Fault(at_s=35.0, kind="snic", target=0, factor=50.0),
    )
    waited = [sum(run.measured.ttft_s) for run in (plain, mended, slowed)]
    assert waited[0] < waited[1] < waited[2]
    for run in (slowed, mended):
        assert run.measured.finished == 180
        assert sum(run.storage.read_bytes) == run.measured.hit_tokens * run.machine.costs.kv_bytes_per_token


def test_a_slow_nic_hurts_dualpath_less() -> None:
    """The scheduler sees the long queue and reads elsewhere."""
    fault = Fault(at_s=0.0, kind="snic", target=0, factor=0.02)
    loss = {
        system: with_faults(system, fault).events.now / with_faults(system).events.now
        for system in ("basic", "dualpath")
    }
    assert 1.0 <= loss["dualpath"] < loss["basic"]


def test_slow_storage_hits_every_node() -> None:
    run = with_faults("dualpath", Fault(at_s=0.0, kind="storage", factor=0.01))
    assert run.events.now > with_faults("dualpath").events.now
    assert run.measured.finished == 180


@pytest.mark.parametrize(
    "fault", [Fault(at_s=0.0, kind="snic", target=6), Fault(at_s=0.0, kind="engine_lost", target=12)]
)
def test_a_fault_of_nothing_is_refused(fault: Fault) -> None:
    with pytest.raises(ValueError, match="numbered from 0"):
        plan_faults(simulator_of(machine_of("ds660b-2p4d"), "dualpath"), [fault])


@pytest.mark.parametrize("wrong", [{"at_s": -1.0}, {"at_s": 0.0, "factor": 0.0}])
def test_senseless_faults_are_refused(wrong: "dict[str, float]") -> None:
    with pytest.raises(ValueError, match="below zero"):
        Fault(kind="storage", **wrong)
