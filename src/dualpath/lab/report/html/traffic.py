"""Charts of the storage NICs: bytes by engine, and rate and balance over time if there are samples."""

from collections.abc import Sequence
from typing import Any

from dualpath.lab.report.balance import balance_of, prefill_first, snic_windows
from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, line, rounded
from dualpath.lab.report.html.runs import Entry
from dualpath.lab.report.palette import ENGINE_COLOURS, colour_of
from dualpath.results.cells import Cell, comparisons
from dualpath.results.file import ResultFile
from dualpath.results.roles import is_oracle, readers

MAX_POINTS = 240
"""Windows in a chart of rates: as many as a screen can separate."""
WINDOW_S = 1.0
"""Window of the paper's figures. Engines count a read when it is done, so shorter windows show when reads are counted;
longer runs have wider windows, so that there are at most `MAX_POINTS`."""


def traffic_section(cells: Sequence[Cell]) -> Section:
    """By setting: each engine's SNIC bytes, and max/avg over windows of each system's median run."""
    found = comparisons(cells)
    groups = [list(one.cells.values()) for one in found]
    bytes_note = (
        "GB that each engine's storage NIC received, in the median run. max/avg, in the legend, is over the engines "
        "that the system may read with; 1.00 is a perfect balance."
    )
    balance_note = (
        f"The busiest NIC's bytes over the average, in windows of {WINDOW_S:g} s or more; gaps are windows in "
        "which next to nothing was read."
    )
    charts = [
        Chart("snic-bytes", "Bytes from storage by engine", bytes_note, [_bytes(group) for group in groups]),
        Chart("snic-balance", "Balance over time", balance_note, [_balance(group) for group in groups]),
    ]
    return Section("traffic", "Storage NICs", "", "setting", [one.setting.label for one in found], charts)


def _bytes(cells: list[Cell]) -> Variant | None:
    engines = sorted({name for cell in cells for name in cell.median.snic_bytes}, key=prefill_first)
    if not engines:
        return None
    traces, rows = [], []
    for cell in cells:
        run = cell.median
        gigabytes = [rounded(run.snic_bytes.get(name, 0) / 1e9) for name in engines]
        ratio = "" if run.snic_max_over_avg is None else f" (max/avg {run.snic_max_over_avg:.2f})"
        traces.append(
            {
                "type": "bar",
                "name": f"{cell.system}{ratio}",
                "x": engines,
                "y": gigabytes,
                "text": [f"{value:.2f}" if value else "0" for value in gigabytes],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {"color": colour_of(cell.system)},
                "hovertemplate": f"{cell.system}<br>%{{x}}: %{{y:.3f}} GB<extra></extra>",
            }
        )
        may_read = readers(cell.system, engines)
        rows += [
            [cell.system, name, n, "yes" if name in may_read else "no"]
            for name, n in zip(engines, gigabytes, strict=True)
        ]
    layout = {"barmode": "group", "xaxis": axis(""), "yaxis": axis("GB", rangemode="tozero")}
    return Variant(traces, layout, ["system", "engine", "GB", "may read"], rows)


def _balance(cells: list[Cell]) -> Variant | None:
    traces: list[dict[str, Any]] = []
    rows: list[list[Value]] = []
    for cell in cells:
        run = cell.median
        windows = snic_windows(run.snic_samples, WINDOW_S, MAX_POINTS)
        engines = [] if windows is None else readers(cell.system, windows.engines)
        if windows is None or len(engines) < 2:
            continue
        ratios = balance_of(windows.of(engines)).max_over_avg
        known = sorted(ratio for ratio in ratios if ratio is not None)
        if not known:
            continue
        traces.append(line(cell.system, colour_of(cell.system), windows.ends_s, ratios, "to %{x:.1f} s: %{y:.2f}"))
        rows.append(
            [cell.system, rounded(windows.width_s), len(known), rounded(known[len(known) // 2]), rounded(known[-1])]
        )
    if not traces:
        return None
    layout = {"xaxis": axis("seconds from the run's start"), "yaxis": axis("max/avg", rangemode="normal")}
    return Variant(traces, layout, ["system", "window s", "windows", "median", "most"], rows)


def rates_section(entries: Sequence[Entry], results: Sequence[ResultFile]) -> Section:
    """By run with samples: each SNIC's rate over time, beside the rate limit."""
    sampled = [entry for entry in entries if len(entry.run.snic_samples) > 1]
    note = f"Received from storage, in windows of {WINDOW_S:g} s or more. Dashed: the rate limit of each NIC."
    charts = [Chart("snic-rate", "Rate of each storage NIC", note, [_rates(entry, results) for entry in sampled])]
    return Section("rates", "NIC rates", "", "run", [entry.label for entry in sampled], charts)


def _rates(entry: Entry, results: Sequence[ResultFile]) -> Variant | None:
    windows = snic_windows(entry.run.snic_samples, WINDOW_S, MAX_POINTS)
    if windows is None:
        return None
    traces: list[dict[str, Any]] = []
    rows: list[list[Value]] = []
    for at, engine in enumerate(windows.engines):
        rates = windows.work[at] / windows.width_s / 1e6
        colour = ENGINE_COLOURS[at % len(ENGINE_COLOURS)]
        traces.append(line(engine, colour, windows.ends_s, rates.round(3).tolist(), "to %{x:.1f} s: %{y:.1f} MB/s"))
        rows.append([engine, rounded(float(rates.mean()), 2), rounded(float(rates.max()), 2)])
    layout: dict[str, Any] = {"xaxis": axis("seconds from the run's start"), "yaxis": axis("MB/s", rangemode="tozero")}
    limit = _rate_limit(entry, results)
    if limit is not None:
        layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit / 1e6, "y1": limit / 1e6}]
    return Variant(traces, layout, ["engine", "mean MB/s", "most MB/s"], rows)


def _rate_limit(entry: Entry, results: Sequence[ResultFile]) -> int | None:
    if entry.run.cluster is not None:
        rate = entry.run.cluster.snic_bytes_per_s
        return rate if isinstance(rate, int) else None
    return None if is_oracle(entry.run.system) else results[entry.source].configuration.snic_rate
