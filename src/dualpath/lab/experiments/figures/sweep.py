"""Lines over what an experiment varies: job completion time, and its ratio to basic beside the ideal."""

from pathlib import Path
from typing import Any

from dualpath.lab.experiments.figures.panels import (
    DASHES,
    INK,
    canvas,
    dashed,
    from_zero,
    grid,
    label_above,
    line,
    system_legend,
    ticks_at,
)
from dualpath.results.cells import UNITS, MeasuredPoint, measured_points, parameter_names, place, systems_of
from dualpath.results.file import ResultFile

Panel = tuple[str, list[MeasuredPoint]]
"""Title, and points that differ in the first parameter only."""


def draw_sweep(result: ResultFile, path: Path) -> None:
    """The first parameter is the x axis; every combination of topology and other parameters has a column."""
    names = parameter_names(result)
    points = measured_points(result)
    if not names or not points:
        raise ValueError("nothing to draw: no run has a parameter that varies")
    panels = split(points, names[0])
    alone = len(panels) == 1
    rows, columns = (1, 2) if alone else (2, len(panels))
    with canvas(path, rows, columns, 4.2 if alone else 6.4) as (figure, axes):
        for index, (title, members) in enumerate(panels):
            times, ratios = axes[index], axes[index + (1 if alone else columns)]
            _draw_times(times, members, names[0])
            _draw_ratios(ratios, members, names[0])
            times.set_title(
                "Job completion time (s), lower is better" if alone else title, fontsize=11 if alone else 9.5
            )
            ratios.set_title("Times faster than basic" if alone else "")
            ratios.set_xlabel(UNITS.get(names[0], names[0]))
            if alone:
                times.set_xlabel(UNITS.get(names[0], names[0]))
        from_zero(*axes[: len(panels)])
        from_zero(*axes[len(panels) :])
        if not alone:
            axes[0].set_ylabel("job completion time (s)")
            axes[columns].set_ylabel("times faster than basic")
        system_legend(figure, systems_of(points), [dashed("the most that pooling storage NICs could give")])


def split(points: list[MeasuredPoint], axis: str) -> list[Panel]:
    """Panels by topology and all parameters but `axis`."""
    panels: dict[str, list[MeasuredPoint]] = {}
    for point in points:
        others = {name: value for name, value in point.parameters.items() if name != axis}
        panels.setdefault(place(point.topology, others), []).append(point)
    return list(panels.items())


def _draw_times(axes: Any, points: list[MeasuredPoint], axis: str) -> None:
    for system in systems_of(points):
        found = [
            (float(point.parameters[axis]), spread)
            for point in points
            if point.complete(system) and (spread := point.cells[system].spread(lambda run: run.jct_s))
        ]
        line(axes, system, found)
    ticks_at(axes, (float(point.parameters[axis]) for point in points))
    grid(axes)


def _draw_ratios(axes: Any, points: list[MeasuredPoint], axis: str) -> None:
    ideals = []
    for system in systems_of(points):
        found = [
            (float(point.parameters[axis]), spread)
            for point in points
            if system != "oracle" and (spread := point.cells[system].spread(lambda run: run.ratio_to_basic))
        ]
        line(axes, system, found)
        for x, spread in found if system == "dualpath" else ():
            label_above(axes, x, spread.median, f"{spread.median:.2f}×", lift=-16)
    for point in points:
        run = point.complete("dualpath")
        if run is not None and run.ideal_ratio is not None:
            ideals.append((float(point.parameters[axis]), run.ideal_ratio))
    axes.plot([x for x, _ in ideals], [ratio for _, ratio in ideals], color=INK, lw=1.4, ls=DASHES)
    ticks_at(axes, (float(point.parameters[axis]) for point in points))
    grid(axes)
