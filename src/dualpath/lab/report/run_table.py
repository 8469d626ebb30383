"""Makes a table with a row per setting and system, for the terminal and for Markdown."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.results.cells import Cell, Spread, cells_of, number, systems_of
from dualpath.results.file import ResultFile, Run
from dualpath.results.roles import foremost

Rows = tuple[list[str], list[list[str]]]
"""Headings, with the line breaks of a terminal's, and the texts of each row."""
LATENCY_HEADINGS = ("TTFT s\np50/p99", "TTST ms\np50/p99", "TPOT ms\np50/p99")
TRAFFIC = "GB by SNIC\nPE | DE"


def terminal_table(result: ResultFile) -> Table:
    """Shows JCT, ratios, latencies (p50/p99), storage traffic. With repeats, the median run and the range of JCTs."""
    headings, texts = _rows(result)
    left = headings.index("system")
    headline = foremost(systems_of(cells_of(result)))
    table = Table(title=_title(result), title_justify="left", title_style="", header_style="bold", box=SIMPLE_HEAD)
    table.padding, table.collapse_padding = (0, 0), True
    for index, heading in enumerate(headings):
        left_justified = index <= left or heading == TRAFFIC
        table.add_column(heading, justify="left" if left_justified else "right", no_wrap=True)
    before: list[str] | None = None
    for row in texts:
        again = row[:left] == before
        if before is not None and not again:
            table.add_section()
        before = row[:left]
        style = "bold" if row[left] == headline else None
        table.add_row(*([""] * left if again else row[:left]), *row[left:], style=style)
    return table


def markdown_table(result: ResultFile) -> str:
    """Returns the same table in Markdown."""
    headings, texts = _rows(result)
    lines = [headings, ["---"] * len(headings), *texts]
    plain = [[text.replace("|", "/").replace("\n", " ") for text in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in plain)


def _rows(result: ResultFile) -> Rows:
    """Leaves ratios out if agents arrive at random, because the arrivals then set how long the job takes."""
    cells = cells_of(result)
    names = list(dict.fromkeys(name for cell in cells for name, _ in cell.setting.parameters))
    failed = any(run.errors for run in result.runs)
    headings = ["nodes", *(name.replace("_", "\n") for name in names), "system", "JCT s", "over\nbasic", "of ideal"]
    headings += [*LATENCY_HEADINGS, "hit\nrate", "SNIC\nmax/avg"]
    headings += ([] if names else [TRAFFIC]) + (["failed\nturns"] if failed else [])
    rows = []
    for cell in cells:
        parameters = dict(cell.setting.parameters)
        row = [cell.setting.topology, *(number(parameters.get(name, "")) for name in names), cell.system]
        row += _figures(cell) + ([] if names else [_traffic(cell.median)])
        rows.append([*row, str(cell.median.errors)] if failed else row)
    return headings, rows


def _title(result: ResultFile) -> str:
    work = result.workload
    return (
        f"{work.agents} agents, {work.turns} turns, {work.prompt_tokens:,} prompt tokens "
        f"(context up to {work.max_context_tokens:,}); {work.warm_up}"
    )


def _figures(cell: Cell) -> list[str]:
    run, offline, times = cell.median, cell.median.agents_per_s is None, cell.jct
    spread = f" ({times.least:.1f}–{times.most:.1f})" if len(cell.counted) > 1 else ""
    return [
        f"{run.jct_s:.1f}{spread}",
        _median(cell.spread(lambda one: one.ratio_to_basic), "{:.2f}×") if offline else "–",
        "" if run.ratio_to_ideal is None or not offline else f"{run.ratio_to_ideal:.0%} of {run.ideal_ratio:.2f}×",
        *latency_texts(run),
        f"{run.hit_rate:.1%}",
        _median(cell.spread(lambda one: one.snic_max_over_avg), "{:.2f}"),
    ]


def latency_texts(run: Run) -> list[str]:
    """Returns a text for each of LATENCY_HEADINGS."""
    return [
        f"{_seconds(run.ttft_p50_s)}/{_seconds(run.ttft_p99_s)}",
        f"{_milliseconds(run.ttst_p50_s)}/{_milliseconds(run.ttst_p99_s)}",
        f"{_milliseconds(run.tpot_p50_s)}/{_milliseconds(run.tpot_p99_s)}",
    ]


def _traffic(run: Run) -> str:
    """Returns ``2.82 | 0 0``: prefill engines, then decode engines."""
    sides = {"PE": "", "DE": ""}
    for engine, n_bytes in run.snic_bytes.items():
        sides[engine[:2]] += f" {n_bytes / 1e9:.2f}" if n_bytes else " 0"
    return " | ".join(side.strip() for side in sides.values())


def _median(spread: Spread | None, form: str) -> str:
    return "–" if spread is None else form.format(spread.median)


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f}"
