"""Engines' loops lag by steps: nothing where nobody else is served, so many steps where somebody is."""

import msgspec
import pytest
from small_cluster import CALIBRATION, machine_of, one_agent, simulate, some_agents

from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.turns import LiveTurn
from dualpath.traces.turn_table import Agents


def _simulated(loop_steps: float, agents: Agents, **options: bool) -> Simulator:
    calibration = msgspec.structs.replace(CALIBRATION, loop_steps=loop_steps)
    return simulate(machine_of("ds660b-2p4d", calibration=calibration), "dualpath", agents, **options)


def test_one_agent_alone_never_waits_for_a_loop() -> None:
    agents = one_agent((9_000, 50), (400, 80), (700, 1))
    none, three = (_simulated(steps, agents).measured for steps in (0.0, 3.0))
    assert three.latency_s == none.latency_s


@pytest.mark.parametrize("exact", [False, True])
def test_others_make_it_wait_for_so_many_of_their_steps(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_in_ns: list[int] = []
    joined_ns: list[int] = []
    hand_in, join = Simulator._hand_in, Simulator._join

    def noted_hand_in(simulator: Simulator, turn: LiveTurn) -> None:
        handed_in_ns.append(simulator.events.now - turn.submitted_ns)
        hand_in(simulator, turn)

    def noted_join(simulator: Simulator, copied: tuple[LiveTurn, int]) -> None:
        joined_ns.append(simulator.events.now - copied[0].copied_ns)
        join(simulator, copied)

    monkeypatch.setattr(Simulator, "_hand_in", noted_hand_in)
    monkeypatch.setattr(Simulator, "_join", noted_join)
    simulator = _simulated(3.0, some_agents(24, 4), exact=exact)
    steps_ns = {3 * (step.end_ns - step.start_ns) for step in simulator.prefill.steps}
    assert len(handed_in_ns) == 96
    assert set(handed_in_ns) <= steps_ns | {0}
    assert sum(lag_ns > 0 for lag_ns in handed_in_ns) > 30
    costs = simulator.machine.costs
    assert len(joined_ns) > 30
    assert all(3 * costs.decode_fixed_ns <= lag_ns <= 3 * costs.decode_ns(24, 24 * 30_000) for lag_ns in joined_ns)


def test_the_lag_holds_no_memory() -> None:
    """It is taken before the scheduler has the turn, so the same reads and batches follow."""
    agents = some_agents(24, 4)
    none, three = (_simulated(steps, agents) for steps in (0.0, 3.0))
    assert sum(three.storage.read_bytes) == sum(none.storage.read_bytes)
    assert three.measured.finished == none.measured.finished == 96


def test_a_lag_is_not_negative() -> None:
    with pytest.raises(ValueError, match="loop_steps is -1"):
        Calibration(loop_steps=-1.0)
