"""Typed records of a result file: what demos, experiments, replays and simulations found, and how to read it back.

::

    from dualpath.results import load_results, to_dataframe

    result = load_results("results/demo.json")
    to_dataframe(result, "turns").groupby(["topology", "system"]).ttft_s.median()
"""

from dualpath.results.cells import Cell, Comparison, Setting, Spread, cells_of, comparisons
from dualpath.results.file import Configuration, ResultFile, ResultFileError, Run, SnicSample, Workload, load_results
from dualpath.results.frames import to_dataframe
from dualpath.results.online import Capacity, Slo, Window
from dualpath.results.turns import ReplayResult, TurnFailure, TurnResult

__all__ = [
    "Capacity",
    "Cell",
    "Comparison",
    "Configuration",
    "ReplayResult",
    "ResultFile",
    "ResultFileError",
    "Run",
    "Setting",
    "Slo",
    "SnicSample",
    "Spread",
    "TurnFailure",
    "TurnResult",
    "Window",
    "Workload",
    "cells_of",
    "comparisons",
    "load_results",
    "to_dataframe",
]
