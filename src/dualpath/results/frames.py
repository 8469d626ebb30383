"""Results as pandas data frames, for notebooks."""

from importlib import import_module
from typing import Any, Literal

import msgspec

from dualpath.results.cells import parameters_of
from dualpath.results.file import ResultFile, Run

NESTED = {
    *("parameters", "turn_results", "failures", "snic_samples", "snic_bytes", "parts", "windows", "cluster"),
    *("error_messages", "pacing", "start_pacing"),
}
"""Fields of a run that are not single values."""


def to_dataframe(result: ResultFile, what: Literal["runs", "turns"] = "runs") -> Any:
    """Returns a `pandas.DataFrame` with a row per run, or per answered turn. Column names contain the units.

    Each parameter is a column; bytes by engine are ``snic_bytes.PE0``, a turn's stages ``timings.read_s``.
    Raises ImportError if pandas is missing, ValueError for another `what`.
    """
    if what not in ("runs", "turns"):
        raise ValueError(f"what must be 'runs' or 'turns', not {what!r}")
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas, which dualpath does not install: pip install pandas") from error
    return pandas.DataFrame([row for run in result.runs for row in ([_run(run)] if what == "runs" else _turns(run))])


def _run(run: Run) -> dict[str, Any]:
    plain = {name: value for name, value in msgspec.structs.asdict(run).items() if name not in NESTED}
    return plain | parameters_of(run) | {f"snic_bytes.{engine}": n for engine, n in run.snic_bytes.items()}


def _turns(run: Run) -> list[dict[str, Any]]:
    shared = {"topology": run.topology, "system": run.system, "repeat": run.repeat} | parameters_of(run)
    rows = []
    for turn in run.turn_results:
        row: dict[str, Any] = shared | msgspec.structs.asdict(turn)
        told = {} if turn.timings is None else msgspec.structs.asdict(turn.timings)
        del row["timings"]
        rows.append(row | {f"timings.{name}": value for name, value in told.items()})
    return rows
