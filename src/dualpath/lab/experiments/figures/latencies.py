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
from dualpath.lab.report.palette import STAGE_COLOURS
from dualpath.results.cells import Cell, cells_of, systems_of
from dualpath.results.file import ResultFile
from dualpath.results.turns import TTFT_STAGES, mean_stages_s

LATENCIES = (
    ("Time to first token (s)", "ttft", 1.0),
    ("First to second token (ms)", "ttst", 1e3),
    ("Time per output token (ms)", "tpot", 1e3),
)
LEGIBLE_SHARE = 0.07
"""Share of the longest bar below which a piece has no figure in it."""


def draw_arrivals(result: ResultFile, path: Path) -> None:
    """Draws TTFT, TTST and TPOT over agents per second: medians solid, 99th percentiles dashed."""
    cells = [cell for cell in cells_of(result) if "agents_per_s" in dict(cell.setting.parameters) and cell.whole]
    if not cells:
        raise ValueError("nothing to draw: no run has agents_per_s as a parameter")
    with canvas(path, 1, len(LATENCIES), 4.0) as (figure, panels):
        for axes, (title, name, factor) in zip(panels, LATENCIES, strict=True):
            for system in systems_of(cells):
                own = [cell for cell in cells if cell.system == system]
                _draw_percentile(axes, own, f"{name}_p50_s", factor)
                _draw_percentile(axes, own, f"{name}_p99_s", factor, ls=DASHES, lw=1.2, alpha=0.75)
            ticks_at(axes, (_rate(cell) for cell in cells))
            axes.set_title(title)
            axes.set_xlabel("agents a second")
            grid(axes)
            from_zero(axes)
        system_legend(figure, systems_of(cells), [dashed("99th percentile")])


def _draw_percentile(axes: Any, cells: list[Cell], field: str, factor: float, **style: Any) -> None:
    """Draws `field` of one system's runs, in seconds times `factor`, over agents per second."""
    scaled = [
        (cell, cell.spread(lambda run: None if getattr(run, field) is None else getattr(run, field) * factor))
        for cell in cells
    ]
    line(axes, cells[0].system, [(_rate(cell), spread) for cell, spread in scaled if spread is not None], **style)


def _rate(cell: Cell) -> float:
    return float(dict(cell.setting.parameters)["agents_per_s"])


def draw_stages(result: ResultFile, path: Path) -> None:
    """Draws a bar per topology and system: mean seconds in each stage before the first token."""
    rows = [
        (cell, means_s)
        for cell in cells_of(result)
        if (means_s := mean_stages_s([turn for run in cell.counted for turn in run.turn_results])) is not None
    ]
    if not rows:
        raise ValueError("nothing to draw: no run has timings")
    with canvas(path, 1, 1, 1.4 + 0.5 * len(rows)) as (figure, (axes,)):
        longest_s = max(sum(means_s.values()) for _, means_s in rows)
        for y, (_, means_s) in enumerate(reversed(rows)):
            _draw_stack(axes, y, means_s, longest_s)
        axes.set_yticks(range(len(rows)), [f"{cell.setting.label}  {cell.system}" for cell, _ in reversed(rows)])
        axes.set_xlim(0, longest_s * 1.12)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.set_title("Mean time to first token (s), by where it went")
        handles = [Patch(color=STAGE_COLOURS[stage], label=stage) for stage in TTFT_STAGES]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _draw_stack(axes: Any, y: float, stages: dict[str, float], longest_s: float) -> None:
    left_s = 0.0
    for stage, seconds in stages.items():
        axes.barh(y, seconds, left=left_s, height=0.7, color=STAGE_COLOURS[stage], edgecolor="white", lw=0.8)
        if seconds > LEGIBLE_SHARE * longest_s:
            axes.text(left_s + seconds / 2, y, f"{seconds:.2f}", ha="center", va="center", size=9)
        left_s += seconds
    axes.annotate(f"{left_s:.2f} s", (left_s, y), (5, 0), textcoords="offset points", va="center", weight="bold")
