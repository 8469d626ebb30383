"""The comparison as a table for a terminal, a Markdown page, a figure and a JSON document."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.lab.paper.archive import FILE_NAME, Archive
from dualpath.lab.paper.rows import Row
from dualpath.lab.paper.runner import Runner
from dualpath.lab.paper.sensitivity import sensitivity_page

CLOSE = 0.10
"""Largest relative error that counts as reproduced."""
CLOSE_COLOUR, FITTED_COLOUR, FAR_COLOUR = "#0072B2", "#8C8C8C", "#D55E00"
PAGE = """\
# The paper's evaluation, simulated

Written by `dualpath paper`; do not edit. Theirs are the figures of DualPath (arXiv 2602.21548), ours come from
the simulator (how it works, which constants were fitted to which figures, and where and why it does not match:
[docs/design/simulator.md](../design/simulator.md)). *Fitted* figures were used to choose a constant; all others are
predictions. Of {predicted} predicted rows, {close} are within 10 %.

![Error of every row](paper.png)

"""


def table_of(rows: Sequence[Row]) -> Table:
    """Makes a table of all rows; those off by more than 10 % are bold."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("item", no_wrap=True)
    table.add_column("figure")
    for heading in ("theirs", "ours", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kind")
    for row in rows:
        style = None if abs(row.error) <= CLOSE else "bold"
        table.add_row(row.item, row.what, *_numbers(row), row.kind, style=style)
    return table


def document_of(archive: Archive, runner: Runner) -> dict[str, Any]:
    """Returns the content of ``--json``: rows, constants, and every simulation's own result."""
    return {**msgspec.to_builtins(archive), "simulations": msgspec.to_builtins(runner.runs())}


def write_results(archive: Archive, directory: Path) -> None:
    """Writes ``paper.json``, ``paper.md`` and ``paper.png``. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(archive), indent=1) + b"\n")
    predicted = [row for row in archive.rows if row.kind == "predicted"]
    close = sum(abs(row.error) <= CLOSE for row in predicted)
    page = PAGE.format(predicted=len(predicted), close=close) + _markdown(archive.rows)
    if archive.sensitivity:
        page += sensitivity_page(archive.sensitivity)
    (directory / "paper.md").write_text(page, encoding="utf-8")
    draw(archive.rows, directory / "paper.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws ours over theirs, one mark per row on a logarithmic axis, with the band that counts as reproduced."""
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.24 * len(rows)), layout="constrained")
    axes.axvspan(1 - CLOSE, 1 + CLOSE, color=CLOSE_COLOUR, alpha=0.12, linewidth=0)
    axes.axvline(1, color="#222222", linewidth=0.8)
    for position, row in enumerate(rows):
        colour = FITTED_COLOUR if row.kind == "fitted" else CLOSE_COLOUR if abs(row.error) <= CLOSE else FAR_COLOUR
        ratio = 1 + row.error
        axes.plot([1, ratio], [position, position], color=colour, linewidth=1.5)
        axes.plot(ratio, position, "s" if row.kind == "fitted" else "o", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), [f"{row.item}: {row.what}" for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("ours over theirs (band: within 10 %; squares: fitted)")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _markdown(rows: Sequence[Row]) -> str:
    lines = ["| item | figure | theirs | ours | error | kind | note |", "|---|---|--:|--:|--:|---|---|"]
    for row in rows:
        theirs, ours, error = _numbers(row)
        error = error if abs(row.error) <= CLOSE else f"**{error}**"
        lines.append(f"| {row.item} | {row.what} | {theirs} | {ours} | {error} | {row.kind} | {row.note} |")
    return "\n".join(lines) + "\n"


def _numbers(row: Row) -> tuple[str, str, str]:
    return _number(row.theirs), _number(row.ours), f"{100 * row.error:+.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
