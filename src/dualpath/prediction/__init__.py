"""The real runtime predicted on a measured machine: core's scheduler between simulated clients and engines."""

from dualpath.prediction.cluster import PredictionError
from dualpath.prediction.machine import MachineError, MachineRates, load_machine
from dualpath.prediction.predict import predict
from dualpath.prediction.table import comparison_table

__all__ = ["MachineError", "MachineRates", "PredictionError", "comparison_table", "load_machine", "predict"]
