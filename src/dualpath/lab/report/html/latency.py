"""Charts of single turns: distributions of the latencies, and where the time to the first token went."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, rounded
from dualpath.lab.report.html.settings import Cell, settings_of
from dualpath.lab.report.html.stages import STAGES, TTFT_STAGES, stages_of
from dualpath.lab.report.palette import STAGE_COLOURS, colour_of
from dualpath.results.turns import TurnResult

MAX_CDF_POINTS = 240
LATENCIES = {
    "ttft": ("Time to first token", "s", 1.0),
    "ttst": ("First to second token", "ms", 1e3),
    "tpot": ("Time per token after the first", "ms", 1e3),
}
"""Of a turn result's ``<key>_s``: its name, unit and the unit's share of a second."""


def latency_section(cells: Sequence[Cell]) -> Section:
    """By setting: the share of turns that took at most so long, all repeats together."""
    timed = [cell for cell in cells if any(run.turn_results for run in cell.runs)]
    settings = settings_of(timed)
    groups = [[cell for cell in timed if cell.setting == setting] for setting in settings]
    charts = [
        Chart(f"cdf-{key}", title, "", [_distribution(group, key) for group in groups])
        for key, (title, _, _) in LATENCIES.items()
    ]
    text = "Share of the turns that took at most so long, of all repeats together. The further left, the better."
    return Section("latency", "Latencies", text, "setting", [setting.label for setting in settings], charts)


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
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": cell.system,
                "x": x,
                "y": y,
                "line": {"color": colour_of(cell.system), "width": 2, "shape": "hv"},
                "hovertemplate": f"<b>{cell.system}</b> %{{y:.1%}} within %{{x:.3g}} {unit}<extra></extra>",
            }
        )
        p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
        rows.append([cell.system, int(values.size), *map(rounded, (float(values.mean()), p50, p90, p99))])
    if not traces:
        return None
    layout = {"xaxis": axis(unit, rangemode="tozero"), "yaxis": axis("", tickformat=".0%", range=[0, 1.02])}
    return Variant(
        traces, layout, ["system", "turns", f"mean {unit}", f"p50 {unit}", f"p90 {unit}", f"p99 {unit}"], rows
    )


def _steps(values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """The distribution of sorted `values`; of many, points at even ranks that keep the first and the last."""
    at = np.unique(np.linspace(0, values.size - 1, min(values.size, MAX_CDF_POINTS)).round().astype(int))
    return [round(float(values[i]), 4) for i in at], [round((int(i) + 1) / values.size, 5) for i in at]


def breakdown_section(cells: Sequence[Cell]) -> Section:
    """By topology: the mean time to first token in its stages, as the server tells it."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if any(turn.timings is not None for run in cell.runs for turn in run.turn_results):
            groups.setdefault(f"{cell.setting.source} {cell.setting.topology}".strip(), []).append(cell)
    note = "Means over the turns of all repeats. " + "; ".join(
        f"{name}: {meaning}" for name, meaning in STAGES.items() if name in TTFT_STAGES
    )
    chart = Chart("breakdown", "Where it goes", note + ".", [*map(_breakdown, groups.values())])
    return Section("breakdown", "Time to first token", "", "topology", list(groups), [chart])


def _breakdown(cells: list[Cell]) -> Variant:
    labels = [f"{cell.setting.label} {cell.system}" for cell in cells]
    turns = [[turn for run in cell.runs for turn in run.turn_results if turn.timings is not None] for cell in cells]
    means = _means_s(turns)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": stage,
            "y": labels,
            "x": means[stage],
            "marker": {"color": STAGE_COLOURS[stage]},
            "hovertemplate": f"%{{y}}<br><b>{stage}</b> %{{x:.3f}} s<extra></extra>",
        }
        for stage in TTFT_STAGES
    ]
    rows: list[list[Value]] = [
        [
            label,
            len(group),
            *(means[stage][at] for stage in TTFT_STAGES),
            rounded(sum(means[stage][at] for stage in TTFT_STAGES)),
        ]
        for at, (label, group) in enumerate(zip(labels, turns, strict=True))
    ]
    layout = {
        "barmode": "stack",
        "xaxis": axis("seconds"),
        "yaxis": {"autorange": "reversed", "automargin": True},
        "height": 110 + 34 * len(labels),
    }
    return Variant(traces, layout, ["", "turns", *(f"{stage} s" for stage in TTFT_STAGES), "sum s"], rows)


def _means_s(groups: list[list[TurnResult]]) -> dict[str, list[float]]:
    """By stage, the mean of each group."""
    stages = [[stages_of(turn) for turn in group] for group in groups]
    return {
        stage: [round(float(np.mean([one[stage] for one in group])), 4) for group in stages] for stage in TTFT_STAGES
    }
