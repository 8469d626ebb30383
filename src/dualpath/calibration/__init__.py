"""Measuring a machine for `dualpath simulate --like`: what the runtime's parts take on it, each by itself."""

from dualpath.calibration.machine import CalibrationOptions, calibrate
from dualpath.calibration.slowdown import MAX_OTHERS_CORES
from dualpath.calibration.table import machine_tables

__all__ = ["MAX_OTHERS_CORES", "CalibrationOptions", "calibrate", "machine_tables"]
