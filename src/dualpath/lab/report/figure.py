"""Result file → one PNG for a README: job completion times beside the traffic of every storage NIC.

A system has the same colour in both panels, and every bar carries its value, so nothing depends on colour alone.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualpath.lab.report.palette import colour_of
from dualpath.results.file import Representative, ResultFile, representatives

INK = "#222222"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
}


BAR_GAP = 0.25
SYSTEM_GAP = 0.5
TOPOLOGY_GAP = 1.1
HEADROOM = 1.15
"""Height of a panel over its tallest bar: room for what is written on top."""


def draw(result: ResultFile, path: Path) -> None:
    """Write the figure of `result` to `path` (1800 pixels wide); its directory must exist."""
    rows = representatives(result)
    if not rows:
        raise ValueError("nothing to draw: the result file has no runs")
    engines = sum(len(row.run.snic_bytes) for row in rows)
    ratios = (max(3.0, len(rows) * 1.0), max(3.0, engines * 0.62))
    with plt.rc_context(STYLE):
        figure, (times, traffic) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=ratios, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03)
        _draw_times(times, rows)
        _draw_traffic(traffic, rows)
        systems = dict.fromkeys(row.run.system for row in rows)
        handles: list[Any] = [Patch(color=colour_of(system), label=system) for system in systems]
        if any(row.run.system == "dualpath" and row.run.ideal_ratio for row in rows):
            handles.append(Line2D([], [], color=INK, lw=1.6, ls=(0, (3, 1.5)), label="dualpath's ideal"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
        figure.savefig(path, dpi=180, facecolor="white")
        plt.close(figure)


def _draw_times(axes: Any, rows: list[Representative]) -> None:
    """A bar per run, with its ratio to basic and its seconds on top; dualpath's with a line at its ideal.

    A run that lost turns is hatched and has no figures: its time means nothing beside the others'.
    """
    positions = _positions([(row.run.topology, 1) for row in rows])
    top_s = HEADROOM * max(row.jct_max_s for row in rows)
    for row, (x,) in zip(rows, positions, strict=True):
        run = row.run
        colour = colour_of(run.system)
        if run.errors:
            axes.bar(x, run.jct_s, width=1, color="white", edgecolor=colour, hatch="///")
            _above(axes, x, row.jct_max_s, f"{run.errors} turns\nlost", size=9)
            continue
        axes.bar(x, run.jct_s, width=1, color=colour)
        if row.repeats > 1:
            below, above = run.jct_s - row.jct_min_s, row.jct_max_s - run.jct_s
            axes.errorbar(x, run.jct_s, [[below], [above]], color=INK, capsize=3, lw=1)
        _above(axes, x, row.jct_max_s, f"{run.jct_s:.1f} s")
        if run.ratio_to_basic is not None and run.system != "basic":
            _above(axes, x, row.jct_max_s, f"{run.ratio_to_basic:.2f}×", lines=1, size=11, weight="bold")
        if run.system == "dualpath" and run.ideal_ratio and run.ratio_to_basic:
            _draw_ideal(axes, x, run.jct_s * run.ratio_to_basic / run.ideal_ratio, run.ideal_ratio, top_s)
    axes.set_title("Job completion time, lower is better")
    axes.set_ylim(0, top_s)
    _name_groups(axes, rows, positions, 0.03)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_ideal(axes: Any, x: float, ideal_s: float, ideal_ratio: float, top_s: float) -> None:
    axes.hlines(ideal_s, x - 0.5, x + 0.5, color="white", lw=3.4)
    axes.hlines(ideal_s, x - 0.5, x + 0.5, color=INK, lw=1.7, ls=(0, (3, 1.5)))
    if ideal_s > 0.2 * top_s:
        label = f"ideal\n{ideal_ratio:.2f}×"
        offset = {"textcoords": "offset points", "ha": "center", "va": "top", "size": 9}
        axes.annotate(label, (x, ideal_s), (0, -5), color="white", linespacing=1.2, **offset)


def _draw_traffic(axes: Any, rows: list[Representative]) -> None:
    """A bar per engine and run, with the balance over those that the system reads with."""
    positions = _positions([(row.run.topology, len(row.run.snic_bytes)) for row in rows])
    ticks: list[float] = []
    names: list[str] = []
    most = max((n_bytes for row in rows for n_bytes in row.run.snic_bytes.values()), default=0) / 1e9
    for row, xs in zip(rows, positions, strict=True):
        heights = [n_bytes / 1e9 for n_bytes in row.run.snic_bytes.values()]
        colour = colour_of(row.run.system)
        axes.bar(xs, heights, width=1, color=colour, edgecolor="white", linewidth=1)
        for x, height in zip(xs, heights, strict=True):
            _above(axes, x, height, f"{height:.2f}" if height else "0", size=8.5)
        if row.run.snic_max_over_avg is not None and sum(height > 0 for height in heights) > 1:
            middle, text = (xs[0] + xs[-1]) / 2, f"max/avg\n{row.run.snic_max_over_avg:.2f}"
            _above(axes, middle, max(heights), text, lines=1.2, size=8.5, weight="bold")
        ticks += xs
        names += row.run.snic_bytes
    axes.set_title("GB read from storage through each engine's SNIC")
    axes.set_ylim(0, HEADROOM * most or 1)
    axes.set_xticks(ticks, names, fontsize=8.5)
    axes.tick_params(axis="x", length=0)
    _name_groups(axes, rows, positions, 0.09)
    axes.set_yticks([])


def _positions(groups: list[tuple[str, int]]) -> list[list[float]]:
    """Centres of unit-wide bars, `count` for each entry; a gap between entries, a wider one between topologies."""
    positions: list[list[float]] = []
    x = 0.0
    for index, (topology, count) in enumerate(groups):
        before = groups[index - 1] if index else None
        if before is not None and before[0] != topology:
            x += TOPOLOGY_GAP
        elif before is not None:
            x += SYSTEM_GAP if max(count, before[1]) > 1 else BAR_GAP
        positions.append([x + bar for bar in range(count)])
        x += count
    return positions


def _name_groups(axes: Any, rows: list[Representative], positions: list[list[float]], below: float) -> None:
    """Topology names, centred under their bars."""
    for topology in dict.fromkeys(row.run.topology for row in rows):
        xs = [x for row, xs in zip(rows, positions, strict=True) if row.run.topology == topology for x in xs]
        if xs:
            middle = (min(xs) + max(xs)) / 2
            axes.text(
                middle, -below, topology, transform=axes.get_xaxis_transform(), ha="center", va="top", weight="bold"
            )


def _above(
    axes: Any, x: float, y: float, text: str, *, lines: float = 0, size: float = 9.5, weight: str = "normal"
) -> None:
    """`text` centred above (x, y), leaving room for `lines` lines of text under it."""
    offset = (0, 3 + lines * 12.5)
    axes.annotate(text, (x, y), offset, textcoords="offset points", ha="center", va="bottom", size=size, weight=weight)
