"""Groups a result file's runs, so that only runs under the same conditions are compared.

A *setting* is a topology with the parameters that runs vary; a *cell* is a system under a setting, with its repeats; a
*comparison* is every system's cell under one setting. Ratios are taken within a comparison only.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec

from dualpath.results.file import ResultFile, Run

Parameters = tuple[tuple[str, float | str], ...]
UNITS = {
    "agents": "agents",
    "turns": "turns",
    "context_tokens": "tokens of first context",
    "append_tokens": "tokens appended a turn",
    "generate_tokens": "tokens generated a turn",
    "spread": "spread of lengths",
    "agents_per_s": "agents a second",
}
"""Name of a chart's axis, by parameter."""


class Setting(msgspec.Struct, frozen=True):
    """The conditions under which systems are compared."""

    topology: str
    parameters: Parameters = ()
    varying: tuple[str, ...] = ()
    """Names of the parameters that differ between the file's runs."""
    source: str = ""
    """The result file's name, if several are read together."""

    @property
    def label(self) -> str:
        """``1P1D, 8 agents, 2000 tokens of first context``; parameters that no run varies are left out."""
        return self.label_without(None)

    def label_without(self, parameter: str | None) -> str:
        """Returns the label without `parameter`."""
        shown = [_said(*one) for one in self.parameters if one[0] in self.varying and one[0] != parameter]
        return ", ".join([self.place, *shown])

    @property
    def place(self) -> str:
        """Source and topology only."""
        return f"{self.source} {self.topology}".strip()


class Spread(msgspec.Struct, frozen=True):
    """Median and range of a figure over repeats."""

    median: float
    least: float
    most: float


class Cell(msgspec.Struct, frozen=True):
    """One system under one setting."""

    setting: Setting
    system: str
    runs: list[Run]
    """All repeats, at least one; those that lost turns too."""

    @property
    def whole(self) -> list[Run]:
        """The repeats that answered every turn."""
        return [run for run in self.runs if not run.errors]

    @property
    def counted(self) -> list[Run]:
        """The repeats that figures come from: those that answered every turn, or all if every one lost turns."""
        return self.whole or self.runs

    @property
    def median(self) -> Run:
        """The counted repeat with the median JCT; of two middle ones, the lower."""
        runs = self.counted
        median_s = statistics.median_low(run.jct_s for run in runs)
        return next(run for run in runs if run.jct_s == median_s)

    @property
    def jct(self) -> Spread:
        """The median run's JCT, with the range over counted repeats."""
        times_s = [run.jct_s for run in self.counted]
        return Spread(self.median.jct_s, min(times_s), max(times_s))

    def spread(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """Median and range of `figure` over counted repeats; None if no run has it."""
        values = [value for value in map(figure, self.counted) if value is not None]
        return Spread(statistics.median(values), min(values), max(values)) if values else None


class Comparison(msgspec.Struct, frozen=True):
    """Every system's cell under one setting."""

    setting: Setting
    cells: dict[str, Cell]
    """Cells by system."""

    def complete(self, system: str | None) -> Run | None:
        """Returns the system's median run; None if it was not run or lost turns in every repeat."""
        cell = self.cells.get(system or "")
        return cell.median if cell is not None and cell.whole else None


def settings_of(result: ResultFile, source: str = "") -> list[Setting]:
    """Returns the setting of each run, in the order of the runs."""
    sets = [parameters_of(run) for run in result.runs]
    names = dict.fromkeys(name for parameters in sets for name in parameters)
    varying = tuple(name for name in names if len({parameters.get(name) for parameters in sets}) > 1)
    return [
        Setting(run.topology, tuple(parameters.items()), varying, source)
        for run, parameters in zip(result.runs, sets, strict=True)
    ]


def cells_of(result: ResultFile, source: str = "") -> list[Cell]:
    """Returns cells ordered by topology (as configured), parameters (ascending) and system (as configured)."""
    groups: dict[tuple[Setting, str], list[Run]] = {}
    for run, setting in zip(result.runs, settings_of(result, source), strict=True):
        groups.setdefault((setting, run.system), []).append(run)
    topologies, systems = result.configuration.topologies, result.configuration.systems

    def place(cell: Cell) -> tuple[object, ...]:
        values = [(name, *_ascending(value)) for name, value in cell.setting.parameters]
        return _place(cell.setting.topology, topologies), values, _place(cell.system, systems)

    return sorted((Cell(setting, system, runs) for (setting, system), runs in groups.items()), key=place)


def comparisons(cells: Iterable[Cell]) -> list[Comparison]:
    """Groups cells by setting, in the order of each setting's first cell."""
    found: dict[Setting, dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, {})[cell.system] = cell
    return [Comparison(setting, by_system) for setting, by_system in found.items()]


def systems_of(cells: Iterable[Cell]) -> list[str]:
    """Returns every system that was run, in order of first use."""
    return list(dict.fromkeys(cell.system for cell in cells))


def parameters_of(run: Run) -> dict[str, float | str]:
    """Returns what the run varies, its arrival rate included."""
    return run.parameters | ({} if run.agents_per_s is None else {"agents_per_s": run.agents_per_s})


def unit_of(parameter: str) -> str:
    """Returns the name of an axis along `parameter`."""
    return UNITS.get(parameter, parameter.replace("_", " "))


def number(value: float | str) -> str:
    """Formats a parameter's value."""
    return value if isinstance(value, str) else f"{value:g}"


def _said(name: str, value: float | str) -> str:
    return f"{number(value)} {UNITS[name]}" if name in UNITS else f"{unit_of(name)} {number(value)}"


def _place(name: str, names: Sequence[str]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)


def _ascending(value: float | str) -> tuple[float, str]:
    return (math.inf, value) if isinstance(value, str) else (value, "")
