"""Bar charts: job completion time by setting and system, beside a panel on the experiment's subject.

A system has the same colour in both panels, and every bar shows its value, so nothing depends on colour alone.
"""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from dualpath.core.systems import BASELINE
from dualpath.lab.experiments.figures.panels import INK, canvas, dashed, label_above, system_legend
from dualpath.lab.experiments.findings import PAPER_ABLATION_PERCENT, TIE_SHARE, jct_change_percent, nic_matches
from dualpath.lab.report.palette import colour_of
from dualpath.results.cells import Cell, cells_of, systems_of
from dualpath.results.file import ResultFile
from dualpath.results.roles import contenders, foremost

WIDE_BARS = 7
"""Bars of a figure of usual size; with more, they are too narrow for ratios."""
SYSTEM_GAP, SETTING_GAP = 0.5, 1.1
"""Gaps between the bars of two systems, and of two settings; a bar is 1 wide."""
MATCH_COLOUR = "#4477AA"
PAPER_COLOUR = "#D55E00"
OFFSET: Any = {"textcoords": "offset points", "size": 9}
DrawPanel = Callable[[Any, ResultFile], None]


def draw_traffic(result: ResultFile, path: Path) -> None:
    """Draws bars by setting and system; beside them the bytes through each engine's storage NIC."""
    cells = cells_of(result)
    engines = sum(len(cell.median.snic_bytes) for cell in cells)
    _draw_times_beside(_draw_nics, result, path, (max(3.0, len(cells) * 1.0), max(3.0, engines * 0.62)))


def draw_topologies(result: ResultFile, path: Path) -> None:
    """Draws bars by topology; beside them the pairs that read with equally many storage NICs, which should tie."""
    _draw_times_beside(_draw_matches, result, path, (3, 2))


def draw_ablation(result: ResultFile, path: Path) -> None:
    """Draws bars by system; beside them the change against basic, with the paper's."""
    _draw_times_beside(_draw_changes, result, path, (3, 2))


def _draw_times_beside(draw_other: DrawPanel, result: ResultFile, path: Path, widths: tuple[float, float]) -> None:
    cells = cells_of(result)
    if not cells:
        raise ValueError("nothing to draw: the result file has no runs")
    with canvas(path, 1, 2, 4.2, width_ratios=widths) as (figure, (times, other)):
        _draw_times(times, cells)
        draw_other(other, result)
        headline = foremost(systems_of(cells))
        has_ideal = any(cell.system == headline and cell.median.ideal_s is not None for cell in cells)
        legend = [dashed(f"{headline}'s ideal")] if has_ideal else []
        system_legend(figure, systems_of(cells), legend, lines=False)


def _draw_times(axes: Any, cells: list[Cell]) -> None:
    headline = foremost(systems_of(cells))
    xs = [x for (x,) in _positions(cells, [1] * len(cells))]
    for x, cell in zip(xs, cells, strict=True):
        _draw_bar(axes, x, cell, headline, 10.5 if len(cells) <= WIDE_BARS else 8.5)
    _name_settings(axes, cells, [[x] for x in xs], 0.03)
    axes.set_title("Job completion time, lower is better")
    axes.set_ylim(0, max(cell.jct.most for cell in cells) * 1.18)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_bar(axes: Any, x: float, cell: Cell, headline: str | None, size: float) -> None:
    """Draws a median with its range, seconds and ratio on top; hatched and without figures if turns were lost."""
    run, times = cell.median, cell.jct
    if not cell.whole:
        axes.bar(x, run.jct_s, width=1, color="white", edgecolor=colour_of(cell.system), hatch="///")
        label_above(axes, x, times.most, f"{run.errors} turns\nlost")
        return
    axes.bar(x, run.jct_s, width=1, color=colour_of(cell.system))
    axes.vlines(x, times.least, times.most, color=INK, lw=1.2)
    label_above(axes, x, times.most, f"{run.jct_s:.1f} s")
    if run.ratio_to_basic is not None and cell.system != BASELINE:
        label_above(axes, x, times.most, f"{run.ratio_to_basic:.2f}×", lift=15, size=size, weight="bold")
    if cell.system == headline and run.ideal_s is not None:
        axes.hlines(run.ideal_s, x - 0.5, x + 0.5, color="white", lw=3.2)
        axes.hlines(run.ideal_s, x - 0.5, x + 0.5, color=INK, lw=1.5, ls=(0, (3, 1.5)))
        label = f"ideal\n{run.ideal_ratio:.2f}×" if size > 10 else ""
        axes.annotate(label, (x, run.ideal_s), (0, -5), color="white", ha="center", va="top", **OFFSET)


def _draw_nics(axes: Any, result: ResultFile) -> None:
    """Draws a bar per engine and run, with the balance over the engines that the system reads with."""
    cells = cells_of(result)
    positions = _positions(cells, [len(cell.median.snic_bytes) for cell in cells])
    most = max((n_bytes for cell in cells for n_bytes in cell.median.snic_bytes.values()), default=0) / 1e9
    for cell, xs in zip(cells, positions, strict=True):
        run, heights = cell.median, [n_bytes / 1e9 for n_bytes in cell.median.snic_bytes.values()]
        axes.bar(xs, heights, width=1, color=colour_of(cell.system), edgecolor="white", linewidth=1)
        for x, height in zip(xs, heights, strict=True):
            label_above(axes, x, height, f"{height:.2f}" if height else "0", size=8.5)
        if run.snic_max_over_avg is not None and sum(height > 0 for height in heights) > 1:
            middle, text = (xs[0] + xs[-1]) / 2, f"max/avg\n{run.snic_max_over_avg:.2f}"
            label_above(axes, middle, max(heights), text, lift=18, size=8.5, weight="bold")
    names = [engine for cell in cells for engine in cell.median.snic_bytes]
    axes.set_xticks([x for xs in positions for x in xs], names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    _name_settings(axes, cells, positions, 0.09)
    axes.set_title("GB read from storage through each engine's SNIC")
    axes.set_ylim(0, 1.15 * most or 1)
    axes.set_yticks([])


def _positions(cells: list[Cell], counts: list[int]) -> list[list[float]]:
    """Returns centres of unit-wide bars, `counts` per cell, with wider gaps between settings than between cells."""
    gap = SYSTEM_GAP if max(counts, default=1) > 1 else SYSTEM_GAP / 2
    gaps = [
        0.0 if before is None else gap if before.setting == cell.setting else SETTING_GAP
        for before, cell in zip([None, *cells], cells, strict=False)
    ]
    starts = accumulate(extra + width for extra, width in zip(gaps, [0, *counts], strict=False))
    return [[start + bar for bar in range(count)] for start, count in zip(starts, counts, strict=True)]


def _name_settings(axes: Any, cells: list[Cell], positions: list[list[float]], below: float) -> None:
    """Writes the settings' labels centred under their bars."""
    for setting in dict.fromkeys(cell.setting for cell in cells):
        xs = [x for cell, xs in zip(cells, positions, strict=True) if cell.setting == setting for x in xs]
        if xs:
            under = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "weight": "bold"}
            axes.text((min(xs) + max(xs)) / 2, -below, setting.label.replace(", ", "\n"), **under)


def _draw_matches(axes: Any, result: ResultFile) -> None:
    matches = nic_matches(result)[::-1]
    if not matches:
        where = {"xy": (0.5, 0.5), "xycoords": "axes fraction", "ha": "center"}
        axes.annotate("no pair: storage does not bind", **where, bbox={"fc": "white", "lw": 0})
    axes.axvspan(1 - TIE_SHARE, 1 + TIE_SHARE, color="#EEEEEE", lw=0)
    axes.axvline(1, color=INK, lw=1)
    for y, match in enumerate(matches):
        axes.plot(match.jct_ratio, y, marker="o", ms=9, color=MATCH_COLOUR)
        label_above(axes, match.jct_ratio, y, f"{match.jct_ratio:.2f}", lift=8, size=10)
    axes.set_yticks(range(len(matches)), [f"{match.first}\nover {match.second}" for match in matches])
    axes.set_ylim(-0.6, len(matches) - 0.2)
    furthest = max([0.35, *(abs(match.jct_ratio - 1) * 1.2 for match in matches)])
    axes.set_xlim(1 - furthest, 1 + furthest)
    axes.tick_params(length=0)
    axes.set_title("Equal storage bandwidth: JCT ratio")


def _draw_changes(axes: Any, result: ResultFile) -> None:
    cells = [cell for cell in cells_of(result) if contenders([cell.system])]
    changes = [(cell.system, spread) for cell in cells if (spread := cell.spread(jct_change_percent))][::-1]
    least = min([spread.least for _, spread in changes] + list(PAPER_ABLATION_PERCENT.values()), default=-50.0)
    most = max([spread.most for _, spread in changes] + [0.0])
    for y, (system, spread) in enumerate(changes):
        axes.barh(y, spread.median, height=0.62, color=colour_of(system))
        axes.hlines(y, spread.least, spread.most, color=INK, lw=1.2)
        paper = PAPER_ABLATION_PERCENT.get(system)
        if paper is not None:
            axes.plot([paper, paper], [y - 0.42, y + 0.42], color=PAPER_COLOUR, lw=2.2)
        text = f"{spread.median:+.0f} %" + ("" if paper is None else f" (paper {paper:+.0f} %)")
        axes.annotate(text.replace("-", "−"), (max(0.0, spread.most), y), (5, 0), va="center", **OFFSET)
    axes.set_yticks(range(len(changes)), [system for system, _ in changes])
    axes.set_xlim(least * 1.05, most + 0.6 * (most - least))
    axes.set_ylim(-0.7, len(changes) - 0.3)
    axes.axvline(0, color=INK, lw=1)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_title("Change of JCT against basic")
