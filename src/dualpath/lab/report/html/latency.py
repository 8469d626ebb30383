"""Charts of single turns: distributions of the latencies, and the stages of the time to first token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, line, rounded
from dualpath.lab.report.palette import STAGE_COLOURS, colour_of
from dualpath.results.cells import Cell, comparisons
from dualpath.results.turns import STAGES, TTFT_STAGES, mean_stages_s

MAX_CDF_POINTS = 240
Bar = tuple[str, int, dict[str, float]]
"""Label, turns, and mean seconds by stage."""
LATENCIES = {
    "ttft": ("Time to first token", "s", 1.0),
    "ttst": ("First to second token", "ms", 1e3),
    "tpot": ("Time per token after the first", "ms", 1e3),
}
"""By key of a turn result's ``<key>_s``: its name, unit, and units per second."""


def latency_section(cells: Sequence[Cell]) -> Section:
    """By setting, shows the share of turns that took at most a given time, all repeats together."""
    found = comparisons(cell for cell in cells if any(run.turn_results for run in cell.runs))
    groups = [list(one.cells.values()) for one in found]
    charts = [
        Chart(f"cdf-{key}", title, "", [_distribution(group, key) for group in groups])
        for key, (title, _, _) in LATENCIES.items()
    ]
    text = "Share of the turns that took at most that time, over all repeats. The further left, the better."
    return Section("latency", "Latencies", text, "setting", [one.setting.label for one in found], charts)


def _distribution(cells: list[Cell], key: str) -> Variant | None:
    _, unit, scale = LATENCIES[key]
    traces: list[dict[str, Any]] = []
    rows: list[list[Value]] = []
    for cell in cells:
        found = [getattr(turn, f"{key}_s") for run in cell.runs for turn in run.turn_results]
        values = np.sort(np.array([value for value in found if value is not None], dtype=np.float64)) * scale
        if not values.size:
            continue
        x, y = _steps(values)
        hover = f"%{{y:.1%}} within %{{x:.3g}} {unit}"
        traces.append(line(cell.system, colour_of(cell.system), x, y, hover, shape="hv"))
        p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
        rows.append([cell.system, int(values.size), *map(rounded, (float(values.mean()), p50, p90, p99))])
    if not traces:
        return None
    layout = {"xaxis": axis(unit, rangemode="tozero"), "yaxis": axis("", tickformat=".0%", range=[0, 1.02])}
    return Variant(
        traces, layout, ["system", "turns", f"mean {unit}", f"p50 {unit}", f"p90 {unit}", f"p99 {unit}"], rows
    )


def _steps(values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Returns the distribution of sorted `values`; of many, points at even ranks, with the first and the last."""
    at = np.unique(np.linspace(0, values.size - 1, min(values.size, MAX_CDF_POINTS)).round().astype(int))
    return [round(float(values[i]), 4) for i in at], [round((int(i) + 1) / values.size, 5) for i in at]


def breakdown_section(cells: Sequence[Cell]) -> Section:
    """By topology, shows the stages of the mean time to first token, as the server reports them."""
    groups: dict[str, list[Bar]] = {}
    for cell in cells:
        told = [turn for run in cell.runs for turn in run.turn_results if turn.timings is not None]
        means_s = mean_stages_s(told)
        if means_s is not None:
            bar = (f"{cell.setting.label} {cell.system}", len(told), means_s)
            groups.setdefault(cell.setting.place, []).append(bar)
    note = "Means over the turns of all repeats. " + "; ".join(f"{name}: {STAGES[name]}" for name in TTFT_STAGES)
    chart = Chart("breakdown", "Where it goes", note + ".", [*map(_breakdown, groups.values())])
    return Section("breakdown", "Time to first token", "", "topology", list(groups), [chart])


def _breakdown(bars: list[Bar]) -> Variant:
    labels = [label for label, _, _ in bars]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": stage,
            "y": labels,
            "x": [rounded(means_s[stage]) for _, _, means_s in bars],
            "marker": {"color": STAGE_COLOURS[stage]},
            "hovertemplate": f"%{{y}}<br><b>{stage}</b> %{{x:.3f}} s<extra></extra>",
        }
        for stage in TTFT_STAGES
    ]
    rows: list[list[Value]] = [
        [label, turns, *map(rounded, means_s.values()), rounded(sum(means_s.values()))]
        for label, turns, means_s in bars
    ]
    layout = {
        "barmode": "stack",
        "xaxis": axis("seconds"),
        "yaxis": {"autorange": "reversed", "automargin": True},
        "height": 110 + 34 * len(labels),
    }
    return Variant(traces, layout, ["", "turns", *(f"{stage} s" for stage in TTFT_STAGES), "sum s"], rows)
