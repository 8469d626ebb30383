"""The simulator: core's scheduler under a virtual clock, with simulated engines, links and agents."""

from dualpath.lab.sim.costs import Calibration
from dualpath.lab.sim.faults import Fault
from dualpath.lab.sim.result import SimulationResult
from dualpath.lab.sim.run import Scenario, run_scenario
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.workloads import agents_of

__all__ = ["Calibration", "Fault", "Scenario", "SimulationResult", "Simulator", "agents_of", "run_scenario"]
