"""The cluster under a virtual clock: core's scheduler with simulated engines, links and agents."""

from dualpath.sim.costs import Calibration
from dualpath.sim.faults import Fault
from dualpath.sim.result import SimulationResult
from dualpath.sim.run import Scenario, run_scenario
from dualpath.sim.simulator import Simulator
from dualpath.sim.workloads import agents_of

__all__ = ["Calibration", "Fault", "Scenario", "SimulationResult", "Simulator", "agents_of", "run_scenario"]
