"""Capacity planning in closed form: what a cluster, a model and a workload allow, and what limits them."""

from dualpath.lab.planning.capacity import Plan, PlanError, Slo, plan_capacity
from dualpath.lab.planning.turn_load import TurnLoad, turn_load

__all__ = ["Plan", "PlanError", "Slo", "TurnLoad", "plan_capacity", "turn_load"]
