"""Line charts over what an experiment varies: job completion time, and its ratio to basic beside the ideal."""

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
from dualpath.results.cells import Cell, cells_of, systems_of, unit_of
from dualpath.results.file import ResultFile
from dualpath.results.roles import foremost, is_oracle


def draw_sweep(result: ResultFile, path: Path) -> None:
    """Draws the first parameter along x; each combination of topology and other parameters gets a column."""
    cells = cells_of(result)
    names = list(dict.fromkeys(name for cell in cells for name, _ in cell.setting.parameters))
    if not names:
        raise ValueError("nothing to draw: no run has a parameter that varies")
    panels = split(cells, names[0])
    alone = len(panels) == 1
    rows, columns = (1, 2) if alone else (2, len(panels))
    with canvas(path, rows, columns, 4.2 if alone else 6.4) as (figure, axes):
        for index, (title, members) in enumerate(panels.items()):
            times, ratios = axes[index], axes[index + (1 if alone else columns)]
            _draw_times(times, members, names[0])
            _draw_ratios(ratios, members, names[0])
            times.set_title(
                "Job completion time (s), lower is better" if alone else title, fontsize=11 if alone else 9.5
            )
            ratios.set_title("Times faster than basic" if alone else "")
            for one in (times, ratios) if alone else (ratios,):
                one.set_xlabel(unit_of(names[0]))
        from_zero(*axes[: len(panels)])
        from_zero(*axes[len(panels) :])
        if not alone:
            axes[0].set_ylabel("job completion time (s)")
            axes[columns].set_ylabel("times faster than basic")
        system_legend(figure, systems_of(cells), [dashed("the most that pooling storage NICs could give")])


def split(cells: list[Cell], axis: str) -> dict[str, list[Cell]]:
    """Splits cells into panels by topology and all parameters but `axis`."""
    panels: dict[str, list[Cell]] = {}
    for cell in cells:
        panels.setdefault(cell.setting.label_without(axis), []).append(cell)
    return panels


def _draw_times(axes: Any, cells: list[Cell], axis: str) -> None:
    for system in systems_of(cells):
        own = [cell for cell in cells if cell.system == system and cell.whole]
        line(
            axes, system, [(_at(cell, axis), spread) for cell in own if (spread := cell.spread(lambda run: run.jct_s))]
        )
    ticks_at(axes, (_at(cell, axis) for cell in cells))
    grid(axes)


def _draw_ratios(axes: Any, cells: list[Cell], axis: str) -> None:
    headline = foremost(systems_of(cells))
    for system in systems_of(cells):
        own = [] if is_oracle(system) else [cell for cell in cells if cell.system == system]
        found = [(_at(cell, axis), spread) for cell in own if (spread := cell.spread(lambda run: run.ratio_to_basic))]
        line(axes, system, found)
        for x, spread in found if system == headline else ():
            label_above(axes, x, spread.median, f"{spread.median:.2f}×", lift=-16)
    ideals = [
        (_at(cell, axis), cell.median.ideal_ratio)
        for cell in cells
        if cell.system == headline and cell.whole and cell.median.ideal_ratio is not None
    ]
    axes.plot([x for x, _ in ideals], [ratio for _, ratio in ideals], color=INK, lw=1.4, ls=DASHES)
    ticks_at(axes, (_at(cell, axis) for cell in cells))
    grid(axes)


def _at(cell: Cell, axis: str) -> float:
    return float(dict(cell.setting.parameters)[axis])
