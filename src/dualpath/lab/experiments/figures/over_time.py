"""Balance over time: in each window of a job, the busiest engine over the average."""

from collections.abc import Callable
from pathlib import Path

from dualpath.lab.experiments.balance import WINDOW_S, Balance, attention_balance, snic_balance
from dualpath.lab.experiments.figures.panels import INK, canvas, colour, grid, system_legend
from dualpath.results.cells import cells, place
from dualpath.results.file import ResultFile, Run


def draw_snic_balance(result: ResultFile, path: Path) -> None:
    """Bytes from storage, over the SNICs that a system may read with."""
    _draw(result, path, snic_balance, f"Bytes through storage NICs, busiest over average in {WINDOW_S:g} s windows")


def draw_attention_balance(result: ResultFile, path: Path) -> None:
    """Attention in prefill, over the prefill engines."""
    _draw(result, path, attention_balance, f"Attention in prefill, busiest PE over average in {WINDOW_S:g} s windows")


def _draw(result: ResultFile, path: Path, measure: Callable[[Run], Balance | None], title: str) -> None:
    rows = [(cell, balance) for cell in cells(result) if (balance := measure(cell.run)) is not None]
    if not rows:
        raise ValueError("nothing to draw: no run has what the balance is measured from")
    with canvas(path, 1, 2, 3.8, width_ratios=(3, 1)) as (figure, (windows, overall)):
        for cell, balance in rows:
            windows.plot(balance.ends_s, balance.max_over_avg, color=colour(cell.system), lw=1.8, marker="o", ms=3.5)
        windows.set_title(title)
        windows.set_xlabel("seconds from the start")
        for x, (cell, _) in enumerate(rows):
            values = [found.overall for run in cell.runs if (found := measure(run)) is not None]
            middle = sorted(values)[len(values) // 2]
            overall.bar(x, middle - 1, bottom=1, width=0.7, color=colour(cell.system))
            if len(values) > 1:
                overall.vlines(x, min(values), max(values), color=INK, lw=1.2)
            overall.annotate(
                f"{middle:.2f}", (x, max(values)), (0, 3), textcoords="offset points", ha="center", weight="bold"
            )
        overall.set_title("All windows, by work")
        several = len({(cell.topology, tuple(cell.parameters.items())) for cell, _ in rows}) > 1
        names = [place(cell.topology, cell.parameters) if several else cell.system for cell, _ in rows]
        overall.set_xticks(range(len(rows)), names)
        most = max(1.3, *(max(balance.max_over_avg, default=1.0) for _, balance in rows))
        for axes in (windows, overall):
            grid(axes)
            axes.set_ylim(1, 1 + (most - 1) * 1.1)
        system_legend(figure, dict.fromkeys(cell.system for cell, _ in rows))
