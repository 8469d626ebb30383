"""Bars: job completion time by topology and system, and beside them what the experiment is about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualpath.lab.experiments.figures.panels import INK, canvas, colour, dashed, grid, label_above, system_legend
from dualpath.lab.experiments.findings import (
    PAPER_ABLATION_PERCENT,
    TIE_SHARE,
    equal_bandwidth_pairs,
    jct_change_percent,
)
from dualpath.results.cells import Cell, Spread, measured_points, systems_of
from dualpath.results.file import ResultFile

WIDE_BARS = 7
"""More are too narrow for ratios in the usual size."""
PAIR_COLOUR = "#4477AA"
PAPER_COLOUR = "#D55E00"
OFFSET: Any = {"textcoords": "offset points", "size": 9}


def draw_topologies(result: ResultFile, path: Path) -> None:
    """Bars by topology; beside them the pairs that read with equally many storage NICs, which should tie."""
    _draw_times_beside(_draw_pairs, result, path)


def draw_ablation(result: ResultFile, path: Path) -> None:
    """Bars by system; beside them the change against basic, with the paper's."""
    _draw_times_beside(_draw_changes, result, path)


def _draw_times_beside(draw_other: Callable[[Any, ResultFile], None], result: ResultFile, path: Path) -> None:
    with canvas(path, 1, 2, 4.2, width_ratios=(3, 2)) as (figure, (times, other)):
        _draw_times(times, result)
        draw_other(other, result)
        legend = [dashed("dualpath's ideal")]
        system_legend(figure, systems_of(measured_points(result)), legend, lines=False)


def _draw_times(axes: Any, result: ResultFile) -> None:
    points = measured_points(result)
    bars = sum(len(point.cells) for point in points)
    x, top_s, ticks = 0.0, 0.0, []
    for point in points:
        left = x
        for cell in point.cells.values():
            _bar(axes, x, cell, size=10.5 if bars <= WIDE_BARS else 8.5)
            top_s = max(top_s, *(run.jct_s for run in cell.runs))
            x += 1.15
        ticks.append(((left + x - 1.15) / 2, point.topology))
        x += 0.9
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks], weight="bold")
    axes.set_title("Job completion time (s), lower is better")
    grid(axes)
    axes.set_ylim(0, top_s * 1.18)


def _bar(axes: Any, x: float, cell: Cell, size: float) -> None:
    """A median with its range, seconds and ratio on top; hatched and without figures where turns were lost."""
    run, times = cell.run, cell.spread(lambda run: run.jct_s)
    assert times is not None
    if not cell.complete:
        axes.bar(x, run.jct_s, width=1, color="white", edgecolor=colour(cell.system), hatch="///")
        label_above(axes, x, times.most, f"{run.errors} turns\nlost")
        return
    axes.bar(x, run.jct_s, width=1, color=colour(cell.system))
    if times.most > times.least:
        axes.vlines(x, times.least, times.most, color=INK, lw=1.2)
    label_above(axes, x, times.most, f"{run.jct_s:.1f}")
    if run.ratio_to_basic is not None and cell.system != "basic":
        label_above(axes, x, times.most, f"{run.ratio_to_basic:.2f}×", lift=15, size=size, weight="bold")
    if cell.system == "dualpath" and run.ratio_to_basic is not None and run.ideal_ratio is not None:
        ideal_s = run.jct_s * run.ratio_to_basic / run.ideal_ratio
        axes.hlines(ideal_s, x - 0.5, x + 0.5, color="white", lw=3.2)
        axes.hlines(ideal_s, x - 0.5, x + 0.5, color=INK, lw=1.5, ls=(0, (3, 1.5)))


def _draw_pairs(axes: Any, result: ResultFile) -> None:
    pairs = equal_bandwidth_pairs(result)
    if not pairs:
        where = {"xy": (0.5, 0.5), "xycoords": "axes fraction", "ha": "center"}
        axes.annotate("no pair: storage does not bind", **where, bbox={"fc": "white", "lw": 0})
    axes.axvspan(1 - TIE_SHARE, 1 + TIE_SHARE, color="#EEEEEE", lw=0)
    axes.axvline(1, color=INK, lw=1)
    for y, pair in enumerate(reversed(pairs)):
        axes.plot(pair.jct_ratio, y, marker="o", ms=9, color=PAIR_COLOUR)
        axes.annotate(f"{pair.jct_ratio:.2f}", (pair.jct_ratio, y), (0, 8), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(pairs)), [pair.label for pair in reversed(pairs)])
    axes.set_ylim(-0.6, len(pairs) - 0.2)
    furthest = max((abs(pair.jct_ratio - 1) for pair in pairs), default=0.0)
    axes.set_xlim(1 - max(0.35, furthest * 1.2), 1 + max(0.35, furthest * 1.2))
    axes.tick_params(length=0)
    axes.set_title("Equal storage bandwidth: JCT ratio")


def _draw_changes(axes: Any, result: ResultFile) -> None:
    changes = [(system, spread) for system, spread in _changes(result) if system not in ("basic", "oracle")]
    least = min([spread.least for _, spread in changes] + list(PAPER_ABLATION_PERCENT.values()), default=-50.0)
    most = max([spread.most for _, spread in changes] + [0.0])
    for y, (system, spread) in enumerate(reversed(changes)):
        axes.barh(y, spread.median, height=0.62, color=colour(system))
        if spread.most > spread.least:
            axes.hlines(y, spread.least, spread.most, color=INK, lw=1.2)
        paper = PAPER_ABLATION_PERCENT.get(system)
        if paper is not None:
            axes.plot([paper, paper], [y - 0.42, y + 0.42], color=PAPER_COLOUR, lw=2.2)
        text = f"{spread.median:+.0f} %" + ("" if paper is None else f" (paper {paper:+.0f} %)")
        axes.annotate(text.replace("-", "−"), (max(0.0, spread.most), y), (5, 0), va="center", **OFFSET)
    axes.set_yticks(range(len(changes)), [system for system, _ in reversed(changes)])
    axes.set_xlim(least * 1.05, most + 0.6 * (most - least))
    axes.set_ylim(-0.7, len(changes) - 0.3)
    axes.axvline(0, color=INK, lw=1)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_title("Change of JCT against basic")


def _changes(result: ResultFile) -> list[tuple[str, Spread]]:
    points = measured_points(result)
    found = []
    for cell in points[0].cells.values() if points else ():
        spread = cell.spread(jct_change_percent)
        if spread is not None:
            found.append((cell.system, spread))
    return found
