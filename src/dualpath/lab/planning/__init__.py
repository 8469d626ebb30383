"""Capacity planning in closed form: what a cluster, a model and a workload allow, and what limits them."""

from dualpath.lab.planning.capacity import CapacityPlan, PlanError, plan_capacity
from dualpath.lab.planning.plan import plan
from dualpath.lab.planning.turn_load import TurnLoad, turn_load

__all__ = ["CapacityPlan", "PlanError", "TurnLoad", "plan", "plan_capacity", "turn_load"]
