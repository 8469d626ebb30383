"""The runs of some result files, grouped: what was the same under two runs makes them comparable.

A *setting* is a topology with the parameters that a run varies; a *cell* is a system under a setting, with its repeats.
Ratios are taken between cells of one setting only.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec

from dualpath.results.file import Representative, ResultFile, Run, representative

Parameters = tuple[tuple[str, float | str], ...]


class Setting(msgspec.Struct, frozen=True):
    """What the systems were compared under."""

    source: str
    """Name of the result file; empty where there is but one."""
    topology: str
    parameters: Parameters
    label: str
    """Unique on the page: the source and the parameters only where they differ between runs."""


class Cell(msgspec.Struct, frozen=True):
    """A system under a setting."""

    setting: Setting
    system: str
    runs: list[Run]
    """Every repeat; those that lost turns too."""
    median: Representative

    @property
    def whole(self) -> list[Run]:
        """Repeats that answered every turn."""
        return [run for run in self.runs if not run.errors]


class Entry(msgspec.Struct, frozen=True):
    """A run with its place on the page."""

    number: int
    source: int
    """Index of its result file."""
    setting: Setting
    run: Run
    label: str
    """``1P2D dualpath``, with the number of the repeat where there are several."""


def entries_of(results: Sequence[ResultFile]) -> list[Entry]:
    """Every run, in the order of the files and of their runs."""
    entries: list[Entry] = []
    for source, result in enumerate(results):
        varying = varying_parameters(result.runs)
        repeated = any(run.repeat for run in result.runs)
        for run in result.runs:
            setting = setting_of(run, source_name(results, source), varying)
            label = f"{setting.label} {run.system}" + (f" #{run.repeat + 1}" if repeated else "")
            entries.append(Entry(len(entries), source, setting, run, label))
    return entries


def source_name(results: Sequence[ResultFile], index: int) -> str:
    """Empty for the only one; numbered where two have the same name."""
    names = [result.name for result in results]
    if len(names) == 1:
        return ""
    return names[index] if names.count(names[index]) == 1 else f"{names[index]} ({index + 1})"


def cells_of(entries: Iterable[Entry], results: Sequence[ResultFile]) -> list[Cell]:
    """By file, topology (as configured), parameters (ascending), system (as configured)."""
    groups: dict[tuple[Setting, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.setting, entry.run.system), []).append(entry)

    def place(group: tuple[tuple[Setting, str], list[Entry]]) -> tuple[object, ...]:
        (setting, system), members = group
        configuration = results[members[0].source].configuration
        return (
            members[0].source,
            _place(setting.topology, configuration.topologies),
            [(key, *_ascending(value)) for key, value in setting.parameters],
            _place(system, configuration.systems),
        )

    return [
        Cell(setting, system, [entry.run for entry in members], representative([entry.run for entry in members]))
        for (setting, system), members in sorted(groups.items(), key=place)
    ]


def settings_of(cells: Iterable[Cell]) -> list[Setting]:
    return list(dict.fromkeys(cell.setting for cell in cells))


def parameters_of(run: Run) -> dict[str, float | str]:
    """What the run varies, its rate of arrivals included."""
    rate = {} if run.agents_per_s is None else {"agents_per_s": run.agents_per_s}
    return rate | run.parameters


def varying_parameters(runs: Iterable[Run]) -> set[str]:
    """Those that not every run has with the same value."""
    sets = [parameters_of(run) for run in runs]
    keys = {key for parameters in sets for key in parameters}
    return {key for key in keys if len({parameters.get(key) for parameters in sets}) > 1}


def setting_of(run: Run, source: str, varying: set[str]) -> Setting:
    parameters = tuple(sorted((key, value) for key, value in parameters_of(run).items() if key in varying))
    shown = [f"{name_of(key)} {_value(value)}" for key, value in parameters]
    label = ", ".join([" ".join(filter(None, [source, run.topology])), *shown])
    return Setting(source, run.topology, parameters, label)


def name_of(parameter: str) -> str:
    """``append_scale`` → ``append scale``; ``agents_per_s`` → ``agents/s``."""
    return parameter.replace("_per_s", "/s").replace("_", " ")


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _place(name: str, names: Sequence[str]) -> tuple[int, str]:
    return (names.index(name) if name in names else len(names), name)


def _ascending(value: float | str) -> tuple[float, str]:
    return (math.inf, value) if isinstance(value, str) else (value, "")
