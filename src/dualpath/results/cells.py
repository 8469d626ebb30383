"""A result file's runs, grouped: what was the same under two runs makes them comparable.

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
"""What an axis of a chart is called, by the name of its parameter."""


class Setting(msgspec.Struct, frozen=True):
    """The circumstances under which systems are compared."""

    topology: str
    parameters: Parameters = ()
    varying: tuple[str, ...] = ()
    """Names of the parameters that differ between runs of the file."""
    source: str = ""
    """The result file's name, where several are read together."""

    @property
    def label(self) -> str:
        """``1P1D, 8 agents, 2000 tokens of first context``; what no run varies is left out."""
        return self.label_without(None)

    def label_without(self, parameter: str | None) -> str:
        """The label with everything but `parameter`."""
        shown = [_said(*one) for one in self.parameters if one[0] in self.varying and one[0] != parameter]
        return ", ".join([self.place, *shown])

    @property
    def place(self) -> str:
        """Source and topology alone."""
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
    """Every repeat, at least one; those that lost turns too."""

    @property
    def whole(self) -> list[Run]:
        """The repeats that answered every turn."""
        return [run for run in self.runs if not run.errors]

    @property
    def counted(self) -> list[Run]:
        """The repeats that figures are taken from: whole ones, or all where every one lost turns."""
        return self.whole or self.runs

    @property
    def median(self) -> Run:
        """The counted repeat with the median JCT, the lower one of two."""
        runs = self.counted
        median_s = statistics.median_low(run.jct_s for run in runs)
        return next(run for run in runs if run.jct_s == median_s)

    @property
    def jct(self) -> Spread:
        """The median run's JCT, and the range over counted repeats."""
        times_s = [run.jct_s for run in self.counted]
        return Spread(self.median.jct_s, min(times_s), max(times_s))

    def spread(self, figure: Callable[[Run], float | None]) -> Spread | None:
        """`figure` over counted repeats; None where no run has it."""
        values = [value for value in map(figure, self.counted) if value is not None]
        return Spread(statistics.median(values), min(values), max(values)) if values else None


class Comparison(msgspec.Struct, frozen=True):
    """Every system's cell under one setting."""

    setting: Setting
    cells: dict[str, Cell]
    """By system."""

    def complete(self, system: str | None) -> Run | None:
        """The system's median run; None where it was not run or lost turns in every repeat."""
        cell = self.cells.get(system or "")
        return cell.median if cell is not None and cell.whole else None


def settings_of(result: ResultFile, source: str = "") -> list[Setting]:
    """The setting of each run, in the order of the runs."""
    sets = [parameters_of(run) for run in result.runs]
    names = dict.fromkeys(name for parameters in sets for name in parameters)
    varying = tuple(name for name in names if len({parameters.get(name) for parameters in sets}) > 1)
    return [
        Setting(run.topology, tuple(parameters.items()), varying, source)
        for run, parameters in zip(result.runs, sets, strict=True)
    ]


def cells_of(result: ResultFile, source: str = "") -> list[Cell]:
    """Cells by topology (as configured), parameters (ascending) and system (as configured)."""
    groups: dict[tuple[Setting, str], list[Run]] = {}
    for run, setting in zip(result.runs, settings_of(result, source), strict=True):
        groups.setdefault((setting, run.system), []).append(run)
    topologies, systems = result.configuration.topologies, result.configuration.systems

    def place(cell: Cell) -> tuple[object, ...]:
        values = [(name, *_ascending(value)) for name, value in cell.setting.parameters]
        return _place(cell.setting.topology, topologies), values, _place(cell.system, systems)

    return sorted((Cell(setting, system, runs) for (setting, system), runs in groups.items()), key=place)


def comparisons(cells: Iterable[Cell]) -> list[Comparison]:
    """The cells of each setting, settings in order of their first cell."""
    found: dict[Setting, dict[str, Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, {})[cell.system] = cell
    return [Comparison(setting, by_system) for setting, by_system in found.items()]


def systems_of(cells: Iterable[Cell]) -> list[str]:
    """Every system that was run, in order of first use."""
    return list(dict.fromkeys(cell.system for cell in cells))


def parameters_of(run: Run) -> dict[str, float | str]:
    """What the run varies, its rate of arrivals included."""
    return run.parameters | ({} if run.agents_per_s is None else {"agents_per_s": run.agents_per_s})


def unit_of(parameter: str) -> str:
    """What an axis along `parameter` is called."""
    return UNITS.get(parameter, parameter.replace("_", " "))


def number(value: float | str) -> str:
    """A parameter's value as text."""
    return value if isinstance(value, str) else f"{value:g}"


def _said(name: str, value: float | str) -> str:
    return f"{number(value)} {UNITS[name]}" if name in UNITS else f"{unit_of(name)} {number(value)}"


def _place(name: str, names: Sequence[str]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)


def _ascending(value: float | str) -> tuple[float, str]:
    return (math.inf, value) if isinstance(value, str) else (value, "")
