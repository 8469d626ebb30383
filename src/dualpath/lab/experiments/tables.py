"""Result file → one row a cell, for the terminal and for Markdown."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.results.cells import Cell, Spread, cells, parameter_names
from dualpath.results.file import ResultFile, Run

LATENCIES = ("ttft", "ttst", "tpot")


def rows(result: ResultFile) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of texts for every cell. With repeats: medians, and the range of job completion times.

    Where agents arrive at random there are no ratios: how long the job took follows from the arrivals.
    """
    names = parameter_names(result)
    failed = any(run.errors for run in result.runs)
    headings = ["nodes", *(name.replace("_", " ") for name in names), "system", "JCT s", "over basic", "of ideal"]
    headings += ["TTFT s p50/p99", "TTST ms p50/p99", "TPOT ms p50/p99", "hit rate", "SNIC max/avg"]
    headings += ["failed turns"] if failed else []
    table = []
    for cell in cells(result):
        row = [cell.topology, *(_parameter(cell.parameters.get(name, "")) for name in names), cell.system]
        row += _figures(cell)
        table.append([*row, str(cell.run.errors)] if failed else row)
    return headings, table


def terminal_table(result: ResultFile) -> Table:
    """For a console."""
    headings, texts = rows(result)
    left = headings.index("system")
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    for index, heading in enumerate(headings):
        # A heading breaks where its last word begins: a column is then as wide as what is in it.
        table.add_column("\n".join(heading.rsplit(" ", 1)), justify="left" if index <= left else "right", no_wrap=True)
    before = None
    for row in texts:
        if before is not None and row[:left] != before:
            table.add_section()
        before = row[:left]
        table.add_row(*row, style="bold" if row[left] == "dualpath" else None)
    return table


def markdown_table(result: ResultFile) -> str:
    """The same in Markdown."""
    headings, texts = rows(result)
    lines = [headings, ["---"] * len(headings), *texts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(cell: Cell) -> list[str]:
    run, offline = cell.run, cell.run.agents_per_s is None
    jct = cell.spread(lambda run: run.jct_s) if cell.complete else None
    return [
        f"{run.jct_s:.1f}" + ("" if jct is None or len(cell.runs) == 1 else f" ({jct.least:.1f}–{jct.most:.1f})"),
        _text(cell.spread(lambda run: run.ratio_to_basic), "{:.2f}×") if offline else "–",
        "–" if run.ratio_to_ideal is None or not offline else f"{run.ratio_to_ideal:.0%} of {run.ideal_ratio:.2f}×",
        *(_latency(run, name) for name in LATENCIES),
        f"{run.hit_rate:.1%}",
        _text(cell.spread(lambda run: run.snic_max_over_avg), "{:.2f}"),
    ]


def _latency(run: Run, name: str) -> str:
    values = [getattr(run, f"{name}_{percentile}_s") for percentile in ("p50", "p99")]
    if name == "ttft":
        return "/".join("–" if value is None else f"{value:.2f}" for value in values)
    return "/".join("–" if value is None else f"{value * 1e3:.0f}" for value in values)


def _text(spread: Spread | None, form: str) -> str:
    return "–" if spread is None else form.format(spread.median)


def _parameter(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
