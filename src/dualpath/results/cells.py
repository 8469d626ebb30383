"""A result file's runs as cells: the repeats of one system on one point, and the points they lie on."""

import statistics
from collections.abc import Callable, Iterable

import msgspec

from dualpath.results.file import ResultFile, Run

PointKey = tuple[str, tuple[tuple[str, float | str], ...]]
"""Topology and parameters."""


class Cell(msgspec.Struct, frozen=True):
    """One system on one point."""

    topology: str
    parameters: dict[str, float | str]
    system: str
    runs: list[Run]
    """Its repeats; those that lost turns only where all did."""

    @property
    def run(self) -> Run:
        """The one with the median JCT."""
        median_s = statistics.median_low(run.jct_s for run in self.runs)
        return next(run for run in self.runs if run.jct_s == median_s)

    @property
    def complete(self) -> bool:
        return not self.run.errors

    def spread(self, figure: Callable[[Run], float | None]) -> "Spread | None":
        """Of `figure` over the repeats; None where no run has it."""
        values = [value for value in map(figure, self.runs) if value is not None]
        return Spread(statistics.median(values), min(values), max(values)) if values else None


class Spread(msgspec.Struct, frozen=True):
    """Median and range over repeats."""

    median: float
    least: float
    most: float


class MeasuredPoint(msgspec.Struct, frozen=True):
    """Every system's cell on one point."""

    topology: str
    parameters: dict[str, float | str]
    cells: dict[str, Cell]
    """By system."""

    def complete(self, system: str) -> Run | None:
        """The system's median run, if it lost no turn."""
        cell = self.cells.get(system)
        return cell.run if cell is not None and cell.complete else None


def measured_points(result: ResultFile) -> list[MeasuredPoint]:
    """In the order in which they were first run."""
    by_point: dict[PointKey, dict[str, list[Run]]] = {}
    for run in result.runs:
        systems = by_point.setdefault((run.topology, tuple(run.parameters.items())), {})
        systems.setdefault(run.system, []).append(run)
    return [
        MeasuredPoint(
            topology,
            dict(parameters),
            {
                system: Cell(topology, dict(parameters), system, [r for r in runs if not r.errors] or runs)
                for system, runs in systems.items()
            },
        )
        for (topology, parameters), systems in by_point.items()
    ]


def cells(result: ResultFile) -> list[Cell]:
    """Point by point."""
    return [cell for point in measured_points(result) for cell in point.cells.values()]


def systems_of(points: Iterable[MeasuredPoint]) -> list[str]:
    """Every system that was run, in order of first use."""
    return list(dict.fromkeys(system for point in points for system in point.cells))


def parameter_names(result: ResultFile) -> list[str]:
    """What was varied beyond topology and system."""
    return list(dict.fromkeys(name for run in result.runs for name in run.parameters))


UNITS = {
    "agents": "agents",
    "turns": "turns",
    "context_tokens": "tokens of first context",
    "append_tokens": "tokens appended a turn",
    "generate_tokens": "tokens generated a turn",
    "spread": "spread of lengths",
    "agents_per_s": "agents a second",
}
"""What an axis is called under a figure."""


def place(topology: str, parameters: dict[str, float | str]) -> str:
    """``1P1D, 8 agents, 2000 tokens of first context``."""
    return ", ".join(
        [topology]
        + [
            f"{value if isinstance(value, str) else format(value, 'g')} {UNITS.get(name, name)}"
            for name, value in parameters.items()
        ]
    )
