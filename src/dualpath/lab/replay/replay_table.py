"""Shows a replay's result on a terminal: a row per run, and sentences about them."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.lab.report.run_table import LATENCY_HEADINGS, latency_texts
from dualpath.results.file import ResultFile, Run
from dualpath.results.turns import Percentiles

_SAYS = {
    "steady": "holds: steady",
    "duration": "holds: to the end",
    "ttft": "TTFT above SLO",
    "tpot": "TPOT above SLO",
    "errors": "turns failed",
}


def replay_table(result: ResultFile) -> Table:
    """Makes the table of JCT, latencies (p50/p99) and the client's pacing."""
    work = result.workload
    title = f"{work.source}: {work.agents} agents, {work.turns} turns, {work.prompt_tokens:,} prompt tokens in all"
    table = Table(
        title=title, title_justify="left", title_style="", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1)
    )
    arriving = any(run.agents_per_s is not None for run in result.runs)
    headings = [
        *(("agents\nper s", "SLO") if arriving else ("JCT s",)),
        "turns",
        "failed",
        *LATENCY_HEADINGS,
        "hit\nrate",
        "pacing ms\np50/p99",
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in result.runs:
        first = (f"{run.agents_per_s:.3g}", _SAYS[run.verdict]) if run.agents_per_s is not None else (_jct(run),)
        table.add_row(*first, *_cells(run))
    return table


def replay_sentences(result: ResultFile) -> Iterator[str]:
    """Says what the figures mean, and what to keep in mind about them."""
    run = result.runs[-1]
    server = run.system if run.cluster is None else f"dualpath, {run.topology} {run.system}"
    yield f"server: {server}, model {result.configuration.model}"
    if result.slo is not None:
        yield (
            f"SLO: TTFT {result.slo.ttft_s:g} s, TPOT {result.slo.tpot_s * 1e3:g} ms, means over the turns of a window"
        )
    if result.capacity is not None:
        yield _capacity(result)
    if run.context == "filled":
        yield (
            "The server does not return token ids: in later prompts, ids chosen by the replay stand for what was "
            "generated, whose KV is therefore found in no cache."
        )
    if len(run.parts) > 1:
        parts = " + ".join(f"{part.wall_s:.1f} s ({part.turns} turns)" for part in run.parts)
        yield f"Resumed: {parts}. The JCT is the sum of the parts, and not comparable."


def _capacity(result: ResultFile) -> str:
    found = result.capacity
    assert found is not None
    if found.fails_agents_per_s is None:
        return f"Capacity: at least {found.holds_agents_per_s:.3g} agents a second; ask about higher rates."
    ended = f"at {found.fails_agents_per_s:.3g}: {_SAYS[found.ended_by or 'errors']}"
    if found.holds_agents_per_s is None:
        return f"Capacity: below the lowest rate that was asked about ({ended})."
    return f"Capacity: {found.holds_agents_per_s:.3g} agents a second ({ended})."


def _jct(run: Run) -> str:
    return f"{run.jct_s:.1f}" + ("*" if len(run.parts) > 1 else "")


def _cells(run: Run) -> tuple[str, ...]:
    reports = run.hit_rate > 0 or any(turn.timings is not None for turn in run.turn_results)
    return (
        str(run.turns),
        f"[red]{run.errors}[/red]" if run.errors else "0",
        *latency_texts(run),
        f"{run.hit_rate:.1%}" if reports else "–",
        _pacing(run.pacing or run.start_pacing),
    )


def _pacing(pacing: Percentiles | None) -> str:
    return "–" if pacing is None else f"{pacing.p50_s * 1e3:.1f}/{pacing.p99_s * 1e3:.1f}"
