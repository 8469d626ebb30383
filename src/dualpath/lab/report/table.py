"""Result file → a table for the terminal, one row per topology and system."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.results.file import Representative, ResultFile, Run, representatives


def run_table(result: ResultFile) -> Table:
    """JCT, ratios, latencies (p50/p99) and storage traffic. With repeats, the median run and the range of JCTs."""
    table = Table(
        title=_title(result), title_justify="left", title_style="", header_style="bold", box=SIMPLE_HEAD, padding=0
    )
    table.add_column("nodes", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in (
        "JCT s",
        "over\nbasic",
        "of ideal",
        "TTFT s\np50 / p99",
        "TTST ms\np50 / p99",
        "TPOT ms\np50 / p99",
        "hit\nrate",
        "SNIC\nmax/avg",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("GB by SNIC\nPE | DE", no_wrap=True)
    failed = any(run.errors for run in result.runs)
    if failed:
        table.add_column("failed\nturns", justify="right")
    topology = None
    for row in representatives(result):
        if topology not in (None, row.run.topology):
            table.add_section()
        cells = _cells(row, first=row.run.topology != topology)
        style = "bold" if row.run.system == "dualpath" else None
        table.add_row(*cells, *([f"[red]{row.run.errors}[/red]"] if failed else []), style=style)
        topology = row.run.topology
    return table


def _title(result: ResultFile) -> str:
    work = result.workload
    return (
        f"{work.agents} agents, {work.turns} turns, {work.prompt_tokens:,} prompt tokens "
        f"(context up to {work.max_context_tokens:,}); {work.warm_up}"
    )


def _cells(row: Representative, first: bool) -> list[str]:
    run = row.run
    spread = "" if row.repeats == 1 else f" ({row.jct_min_s:.1f}–{row.jct_max_s:.1f})"
    return [
        run.topology if first else "",
        run.system,
        f"{run.jct_s:.1f}{spread}",
        _number(run.ratio_to_basic, "{:.2f}×"),
        "" if run.ratio_to_ideal is None else f"{run.ratio_to_ideal:.0%} of {run.ideal_ratio:.2f}×",
        f"{_seconds(run.ttft_p50_s)} / {_seconds(run.ttft_p99_s)}",
        f"{_milliseconds(run.ttst_p50_s)} / {_milliseconds(run.ttst_p99_s)}",
        f"{_milliseconds(run.tpot_p50_s)} / {_milliseconds(run.tpot_p99_s)}",
        f"{run.hit_rate:.1%}",
        _number(run.snic_max_over_avg, "{:.2f}"),
        _traffic(run),
    ]


def _traffic(run: Run) -> str:
    """``2.82 | 0 0``: prefill engines, then decode engines."""
    sides = {"PE": "", "DE": ""}
    for engine, n_bytes in run.snic_bytes.items():
        sides[engine[:2]] += f" {n_bytes / 1e9:.2f}" if n_bytes else " 0"
    return " | ".join(side.strip() for side in sides.values())


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _seconds(seconds: float | None) -> str:
    return _number(seconds, "{:.2f}" if seconds is not None and seconds < 10 else "{:.1f}")


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.0f}"
