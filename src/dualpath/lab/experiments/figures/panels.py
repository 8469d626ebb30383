"""Parts that all figures share: the canvas, lines with ranges, the legend of systems."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dualpath.lab.report.palette import colour_of
from dualpath.results.cells import Spread

DPI = 180
WIDTH_IN = 10.0
INK = "#222222"
FAINT = "#DDDDDD"
DASHES: Any = (0, (3, 1.5))
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


@contextmanager
def canvas(path: Path, rows: int, columns: int, height_in: float, **layout: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yields a figure's axes, row by row; writes the figure to `path` at the end, unless there is an exception."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH_IN, height_in), layout="constrained", squeeze=False, **layout
        )
        try:
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04, hspace=0.04)
            yield figure, list(axes.flat)
            figure.savefig(path, dpi=DPI, facecolor="white")
        finally:
            plt.close(figure)


def line(axes: Any, system: str, points: Sequence[tuple[float, Spread]], **style: Any) -> None:
    """Draws joined medians, with the range over repeats as a whisker."""
    xs = [x for x, _ in points]
    middle = [spread.median for _, spread in points]
    axes.plot(xs, middle, marker="o", ms=5, color=colour_of(system), **({"lw": 2} | style))
    for x, spread in points:
        if spread.most > spread.least:
            axes.vlines(x, spread.least, spread.most, color=colour_of(system), lw=1.2)


def grid(axes: Any) -> None:
    """Draws horizontal lines to read values by."""
    axes.grid(axis="y", color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="both", length=0)


def from_zero(*panels: Any) -> None:
    """Gives all panels one y axis, from 0 to just above the highest point. Call it once everything is drawn."""
    top = max(axes.dataLim.y1 for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top * 1.08 if top > 0 else 1)


def ticks_at(axes: Any, values: Iterable[float]) -> None:
    """Sets exactly these ticks on a logarithmic x axis."""
    found = sorted(set(values))
    if len(found) > 1 and min(found) > 0 and max(found) / min(found) >= 3:
        axes.set_xscale("log")
    axes.set_xticks(found, [f"{value:g}" for value in found])
    axes.minorticks_off()


def system_legend(figure: Any, systems: Iterable[str], more: Sequence[Any] = (), *, lines: bool = True) -> None:
    """Draws the legend under all panels."""
    handles = [
        Line2D([], [], color=colour_of(one), marker="o", ms=5, lw=2, label=one)
        if lines
        else Patch(color=colour_of(one), label=one)
        for one in systems
    ]
    handles += more
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def dashed(label: str) -> Any:
    return Line2D([], [], color=INK, lw=1.4, ls=DASHES, label=label)


def label_above(axes: Any, x: float, y: float, text: str, *, lift: float = 3, size: float = 9, **style: Any) -> None:
    """Writes `text` centred above a point, `lift` typographic points higher."""
    axes.annotate(text, (x, y), (0, lift), textcoords="offset points", ha="center", va="bottom", size=size, **style)
