"""Balance over time: in each window of a job, the busiest engine over the average."""

from collections.abc import Callable
from pathlib import Path

from dualpath.lab.experiments.figures.panels import INK, canvas, grid, label_above, system_legend
from dualpath.lab.experiments.findings import WINDOW_S
from dualpath.lab.report.balance import Balance, attention_balance, snic_balance
from dualpath.lab.report.palette import colour_of
from dualpath.results.cells import cells_of, comparisons
from dualpath.results.file import ResultFile, Run

Measure = Callable[[Run, float], Balance | None]


def draw_snic_balance(result: ResultFile, path: Path) -> None:
    """Draws the balance of bytes from storage, over the SNICs that a system may read with."""
    _draw(result, path, snic_balance, f"Bytes through storage NICs, busiest over average in {WINDOW_S:g} s windows")


def draw_attention_balance(result: ResultFile, path: Path) -> None:
    """Draws the balance of attention in prefill, over the prefill engines."""
    _draw(result, path, attention_balance, f"Attention in prefill, busiest PE over average in {WINDOW_S:g} s windows")


def _draw(result: ResultFile, path: Path, measure: Measure, title: str) -> None:
    rows = [(cell, found) for cell in cells_of(result) if (found := measure(cell.median, WINDOW_S)) is not None]
    if not rows:
        raise ValueError("nothing to draw: no run has what the balance is measured from")

    def overall_of(run: Run) -> float | None:
        found = measure(run, WINDOW_S)
        return None if found is None else found.overall

    with canvas(path, 1, 2, 3.8, width_ratios=(3, 1)) as (figure, (windows, overall)):
        for x, (cell, balance) in enumerate(rows):
            known = [((at + 1) * WINDOW_S, ratio) for at, ratio in enumerate(balance.max_over_avg) if ratio is not None]
            windows.plot(*zip(*known, strict=True), color=colour_of(cell.system), lw=1.8, marker="o", ms=3.5)
            spread = cell.spread(overall_of)
            assert spread is not None, "the median run has a balance"
            overall.bar(x, spread.median - 1, bottom=1, width=0.7, color=colour_of(cell.system))
            overall.vlines(x, spread.least, spread.most, color=INK, lw=1.2)
            label_above(overall, x, spread.most, f"{spread.median:.2f}", size=10, weight="bold")
        windows.set_title(title)
        windows.set_xlabel("seconds from the start")
        overall.set_title("All windows, by work")
        several = len(comparisons(cell for cell, _ in rows)) > 1
        overall.set_xticks(range(len(rows)), [cell.setting.label if several else cell.system for cell, _ in rows])
        most = max([1.3, *(ratio for _, balance in rows for ratio in balance.max_over_avg if ratio is not None)])
        for axes in (windows, overall):
            grid(axes)
            axes.set_ylim(1, 1 + (most - 1) * 1.1)
        system_legend(figure, dict.fromkeys(cell.system for cell, _ in rows))
