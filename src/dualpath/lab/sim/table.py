"""Shows a simulation's result as a table on a terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.lab.sim.result import Distribution, SimulationResult
from dualpath.spec.units import format_bytes


def result_table(result: SimulationResult) -> Table:
    """Makes two columns: what, and how much."""
    table = Table(box=SIMPLE_HEAD, title=_title(result), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in _rows(result):
        table.add_row(name, value)
    return table


def _title(result: SimulationResult) -> str:
    how = "at once" if result.agents_per_s is None else f"at {result.agents_per_s:g} a second"
    return f"{result.cluster}, {result.system}: {result.agents:,} agents of {result.trace} {how}"


def _rows(result: SimulationResult) -> list[tuple[str, str]]:
    rows = [
        ("simulated time", f"{result.simulated_s:,.1f} s"),
        ("agents finished", f"{result.agents_finished:,}"),
        ("turns", f"{result.turns:,}"),
        ("turns per second", f"{result.turns_per_s:,.1f}"),
        ("turns in the system, mean", f"{result.turns_in_system:,.1f}"),
        ("hit share of prompt tokens", f"{result.hit_share:.1%}"),
        ("TTFT", _times(result.ttft_s)),
        ("time to second token", _times(result.ttst_s)),
        ("TPOT", _times(result.tpot_s)),
        ("latency of a turn", _times(result.latency_s)),
        ("storage NICs busy", ", ".join(f"{role} {share:.0%}" for role, share in result.snic_busy.items())),
        ("storage read", _read(result)),
        (f"storage NICs, max over mean ({result.balance_window_s:g} s)", f"{result.snic_max_over_mean:.2f}"),
        ("attention in a group, max over mean, first 5 %", f"{result.attention_max_over_mean:.2f}"),
        ("prefill engines busy", f"{result.prefill_busy:.0%}"),
    ]
    if result.failed or result.retries:
        failed = ", ".join(f"{count} {cause}" for cause, count in result.failed.items()) or "none"
        rows.append(("turns failed; attempts retried", f"{failed}; {result.retries:,}"))
    cost = f"{result.cpu_s:.1f} CPU-s, {result.turns_per_cpu_s:,.0f} turns/CPU-s, {format_bytes(result.peak_rss_bytes)}"
    return [*rows, ("this simulation took", cost)]


def _read(result: SimulationResult) -> str:
    saved = f", {format_bytes(result.snic_unread_bytes)} left that sliding windows had passed"
    return format_bytes(sum(result.snic_read_bytes)) + (saved if result.snic_unread_bytes else "")


def _times(spread: Distribution) -> str:
    return f"mean {_time(spread.mean)}, p50 {_time(spread.p50)}, p90 {_time(spread.p90)}, p99 {_time(spread.p99)}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
