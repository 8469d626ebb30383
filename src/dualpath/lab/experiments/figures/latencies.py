"""Latencies: percentiles over an arrival rate, and the stages of the time to first token as stacked bars."""

from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from dualpath.lab.experiments.figures.panels import (
    DASHES,
    canvas,
    dashed,
    from_zero,
    grid,
    line,
    system_legend,
    ticks_at,
)
from dualpath.lab.experiments.stages import STAGES, mean_stages_s
from dualpath.lab.report.palette import STAGE_COLOURS
from dualpath.results.cells import MeasuredPoint, Spread, cells, measured_points, place, systems_of
from dualpath.results.file import ResultFile, Run

LATENCIES = (
    ("Time to first token (s)", "ttft", 1.0),
    ("First to second token (ms)", "ttst", 1e3),
    ("Time per output token (ms)", "tpot", 1e3),
)
LEGIBLE_SHARE = 0.07
"""Of the longest bar: a shorter piece has no figure in it."""


def draw_arrivals(result: ResultFile, path: Path) -> None:
    """TTFT, TTST and TPOT over agents a second: medians, and the 99th percentiles dashed."""
    points = [point for point in measured_points(result) if "agents_per_s" in point.parameters]
    if not points:
        raise ValueError("nothing to draw: no run has agents_per_s as a parameter")
    with canvas(path, 1, len(LATENCIES), 4.0) as (figure, panels):
        for axes, (title, name, factor) in zip(panels, LATENCIES, strict=True):
            for system in systems_of(points):
                line(axes, system, _percentiles(points, system, f"{name}_p50_s", factor))
                tail = _percentiles(points, system, f"{name}_p99_s", factor)
                line(axes, system, tail, ls=DASHES, lw=1.2, alpha=0.75)
            ticks_at(axes, (float(point.parameters["agents_per_s"]) for point in points))
            axes.set_title(title)
            axes.set_xlabel("agents a second")
            grid(axes)
            from_zero(axes)
        system_legend(figure, systems_of(points), [dashed("99th percentile")])


def _percentiles(points: list[MeasuredPoint], system: str, field: str, factor: float) -> list[tuple[float, Spread]]:
    """`field` of a run times `factor` by agents a second, where the system lost no turn."""

    def figure(run: Run) -> float | None:
        value = getattr(run, field)
        return None if value is None else value * factor

    spreads = [(point, point.cells[system].spread(figure)) for point in points if point.complete(system) is not None]
    return [(float(point.parameters["agents_per_s"]), spread) for point, spread in spreads if spread is not None]


def draw_stages(result: ResultFile, path: Path) -> None:
    """A bar per topology and system: mean seconds in each stage before the first token."""
    rows = [(cell, stages) for cell in cells(result) if (stages := mean_stages_s(cell.runs)) is not None]
    if not rows:
        raise ValueError("nothing to draw: no run has timings")
    with canvas(path, 1, 1, 1.4 + 0.5 * len(rows)) as (figure, (axes,)):
        longest_s = max(sum(stages.values()) for _, stages in rows)
        for y, (_, stages) in enumerate(reversed(rows)):
            _draw_stack(axes, y, stages, longest_s)
        axes.set_yticks(
            range(len(rows)), [f"{place(cell.topology, cell.parameters)}  {cell.system}" for cell, _ in reversed(rows)]
        )
        axes.set_xlim(0, longest_s * 1.12)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.set_title("Mean time to first token (s), by where it went")
        handles = [Patch(color=STAGE_COLOURS[stage], label=stage) for stage in STAGES]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _draw_stack(axes: Any, y: float, stages: dict[str, float], longest_s: float) -> None:
    left_s = 0.0
    for stage, seconds in stages.items():
        axes.barh(y, seconds, left=left_s, height=0.7, color=STAGE_COLOURS[stage], edgecolor="white", lw=0.8)
        if seconds > LEGIBLE_SHARE * longest_s:
            axes.text(left_s + seconds / 2, y, f"{seconds:.2f}", ha="center", va="center", size=9)
        left_s += seconds
    axes.annotate(f"{left_s:.2f} s", (left_s, y), (5, 0), textcoords="offset points", va="center", weight="bold")
