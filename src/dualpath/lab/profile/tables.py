"""Tables of a profile, and of a simulation beside the runs that it simulates."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dualpath.lab.facts.profile import Profile
from dualpath.results.cells import parameters_of
from dualpath.results.file import ResultFile, Run
from dualpath.spec.units import format_rate


def profile_tables(profile: Profile) -> tuple[Table, Table, Table]:
    """Prefill, decode, and the rest. `line` is the fitted line's time of a sample, `off` the line's error."""
    times = profile.step_times()
    prefill = _table(f"Prefill of {profile.model}", "cached", "new", "items", "measured", "line", "off")
    for p in profile.prefill:
        line_ns = times.prefill_ns(p.cached_tokens, p.new_tokens, p.items)
        prefill.add_row(f"{p.cached_tokens:,}", f"{p.new_tokens:,}", f"{p.items}", *_beside(p.ns, line_ns))
    decode = _table("Decode steps", "batch", "context", "measured", "line", "off")
    for d in profile.decode:
        decode.add_row(
            f"{d.batch}", f"{d.context_tokens:,}", *_beside(d.ns, times.decode_ns(d.batch, d.context_tokens))
        )
    rest = _table("Rates and overheads", "", "measured")
    for what, rate in (
        ("store → buffer", profile.rates.store_read_bytes_per_s),
        ("buffer → store, durable", profile.rates.store_write_bytes_per_s),
        ("engine → engine", profile.rates.transfer_bytes_per_s),
        ("buffer → device", profile.rates.copy_bytes_per_s),
    ):
        rest.add_row(what, "–" if rate is None else format_rate(rate))
    rest.add_row("a request, up to its first token", f"{profile.request_ns / 1e6:.1f} ms")
    rest.add_row("each later token, besides its step", f"{profile.token_ns / 1e6:.2f} ms")
    load = profile.machine.load_average
    rest.add_row("load average before", "–" if load is None else f"{load:.1f}")
    return prefill, decode, rest


def comparison_table(measured: ResultFile, predicted: ResultFile) -> Table:
    """Makes a row per run; errors are the simulation's, relative to what was measured."""
    table = _table(f"{measured.name}: measured and simulated", "run", "JCT", "simulated", "off")
    for column in ("mean TTFT", "simulated", "off"):
        table.add_column(column, justify="right")
    for one, other in zip(measured.runs, predicted.runs, strict=True):
        ttft_s, predicted_s = one.mean_ttft_s, other.mean_ttft_s
        ttft = _seconds(ttft_s, predicted_s) if ttft_s and predicted_s else ("–", "–", "–")
        jct = ("lost turns", f"{other.jct_s:.2f} s", "–") if one.errors else _seconds(one.jct_s, other.jct_s)
        table.add_row(_name(one), *jct, *ttft)
    return table


def _name(run: Run) -> str:
    parameters = "".join(f" {name}={value}" for name, value in parameters_of(run).items())
    return f"{run.topology} {run.system}{parameters}" + (f" #{run.repeat + 1}" if run.repeat else "")


def _seconds(measured_s: float, predicted_s: float) -> tuple[str, str, str]:
    return f"{measured_s:.2f} s", f"{predicted_s:.2f} s", f"{predicted_s / measured_s - 1:+.1%}"


def _beside(measured_ns: float, line_ns: float) -> tuple[str, str, str]:
    return f"{measured_ns / 1e6:.1f} ms", f"{line_ns / 1e6:.1f} ms", f"{line_ns / measured_ns - 1:+.0%}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if not number and column in ("", "run") else "right")
    return table
