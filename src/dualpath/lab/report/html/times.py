"""Charts of job completion times: by setting and system, and along a parameter that the runs vary."""

from collections.abc import Callable, Sequence
from typing import Any

from dualpath.core.systems import BASELINE
from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, line, rounded
from dualpath.lab.report.palette import colour_of
from dualpath.results.cells import Cell, comparisons, systems_of, unit_of
from dualpath.results.file import Run
from dualpath.results.roles import foremost

ROOMY = 4
"""Number of settings up to which a chart's bars have room for seconds too."""
MAX_TOGETHER = 8
"""Settings in one chart; beyond this, each topology has its own chart."""


def times_section(cells: Sequence[Cell]) -> Section:
    """Makes bars by setting and system, with the range of the repeats; nothing for a single bar, which a card shows."""
    if len(cells) < 2:
        return Section("times", "Job completion time", "", "", [], [])
    groups: dict[str, list[Cell]] = {"all": list(cells)}
    if len(comparisons(cells)) > MAX_TOGETHER:
        groups = {}
        for cell in cells:
            groups.setdefault(cell.setting.place, []).append(cell)
    note = (
        "Lower is better. Bars are medians, whiskers the range of the repeats, × the ratio to basic. The short line is "
        "the ideal: what pooling every storage NIC could give at best. A hatched run lost turns; its time "
        "compares with nothing."
    )
    chart = Chart(
        "jct", "From the first agent's start to the last one's end", note, [_bars(group) for group in groups.values()]
    )
    return Section("times", "Job completion time", "", "topology", list(groups), [chart])


def _bars(cells: list[Cell]) -> Variant:
    systems = systems_of(cells)
    brief = len(comparisons(cells)) > ROOMY
    traces: list[dict[str, Any]] = []
    for system in systems:
        own = [cell for cell in cells if cell.system == system]
        traces += [_bar(own), _figures_on_bar(own, brief)]
    known = [cell for cell in cells if cell.system == foremost(systems) and cell.median.ideal_s is not None]
    if known:
        traces.append(_ideal_trace(known))
    rows: list[list[Value]] = []
    for cell in cells:
        run, jct = cell.median, cell.jct
        figures = (run.jct_s, jct.least, jct.most, run.ratio_to_basic, run.ratio_to_ideal)
        rows.append([cell.setting.label, cell.system, *map(rounded, figures), len(cell.counted), run.errors])
    columns = ["setting", "system", "JCT s", "least s", "most s", "over basic", "of ideal", "repeats", "lost turns"]
    layout = {
        "barmode": "group",
        "scattermode": "group",
        "xaxis": axis(""),
        "yaxis": axis("seconds", rangemode="tozero"),
    }
    return Variant(traces, layout, columns, rows)


def _bar(cells: list[Cell]) -> dict[str, Any]:
    times = [cell.jct for cell in cells]
    return {
        "type": "bar",
        "name": cells[0].system,
        "offsetgroup": cells[0].system,
        "x": [_tick(cell) for cell in cells],
        "y": [rounded(one.median) for one in times],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(one.most - one.median) for one in times],
            "arrayminus": [rounded(one.median - one.least) for one in times],
            "visible": any(len(cell.counted) > 1 for cell in cells),
        },
        "marker": {
            "color": colour_of(cells[0].system),
            "pattern": {"shape": ["/" if cell.median.errors else "" for cell in cells]},
        },
        "hovertemplate": "%{x}<br><b>%{fullData.name}</b> %{y:.2f} s<extra></extra>",
    }


def _tick(cell: Cell) -> str:
    return cell.setting.label.replace(", ", "<br>")


def _figures_on_bar(cells: list[Cell], brief: bool) -> dict[str, Any]:
    """Puts figures above the whiskers, because plotly's own labels would be under them."""
    return {
        "type": "scatter",
        "mode": "text",
        "showlegend": False,
        "hoverinfo": "skip",
        "offsetgroup": cells[0].system,
        "x": [_tick(cell) for cell in cells],
        "y": [rounded(cell.jct.most) for cell in cells],
        "text": [_on_bar(cell.median, brief) for cell in cells],
        "textposition": "top center",
        "cliponaxis": False,
    }


def _on_bar(run: Run, brief: bool) -> str:
    if run.errors:
        return f"{run.errors} lost"
    ratio = "" if run.ratio_to_basic is None or run.system == BASELINE else f"<b>{run.ratio_to_basic:.2f}×</b>"
    return ratio if brief else "<br>".join(filter(None, [ratio, f"{run.jct_s:.1f} s"]))


def _ideal_trace(cells: list[Cell]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"{cells[0].system}'s ideal",
        "offsetgroup": cells[0].system,
        "x": [_tick(cell) for cell in cells],
        "y": [rounded(cell.median.ideal_s) for cell in cells],
        "customdata": [rounded(cell.median.ideal_ratio, 3) for cell in cells],
        "marker": {"symbol": "line-ew", "size": 26, "line": {"width": 3}},
        "hovertemplate": "%{x}<br>ideal %{y:.2f} s (%{customdata:.2f}×)<extra></extra>",
    }


SWEPT: dict[str, tuple[str, Callable[[Cell], float | None]]] = {
    "Job completion time": ("seconds", lambda cell: cell.median.jct_s),
    "Over basic": ("×", lambda cell: cell.median.ratio_to_basic),
    "Mean time to first token": ("seconds", lambda cell: cell.median.mean_ttft_s),
}


def sweep_section(cells: Sequence[Cell]) -> Section:
    """Makes lines along each parameter with more than one value, with all other parameters fixed."""
    sweeps = _sweeps([cell for cell in cells if not cell.median.errors])
    charts = [
        Chart(f"sweep-{index}", title, "", [_lines(key, group, unit, figure) for (key, _), group in sweeps.items()])
        for index, (title, (unit, figure)) in enumerate(SWEPT.items())
    ]
    text = "Medians along a parameter that the runs vary; everything else in the choice's name is held fixed."
    return Section("sweeps", "Sweeps", text, "sweep", [label for _, label in sweeps], charts)


def _sweeps(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell.setting.varying):
        for cell in cells:
            if name in dict(cell.setting.parameters):
                found.setdefault((name, f"{unit_of(name)}: {cell.setting.label_without(name)}"), []).append(cell)
    return {name: group for name, group in found.items() if len(comparisons(group)) > 1}


def _lines(key: str, cells: list[Cell], unit: str, figure: Callable[[Cell], float | None]) -> Variant | None:
    points = [(dict(cell.setting.parameters)[key], cell, figure(cell)) for cell in cells]
    known = [(x, cell, y) for x, cell, y in points if y is not None]
    if not known:
        return None
    traces = []
    for system in systems_of(cell for _, cell, _ in known):
        own = [(x, y) for x, cell, y in known if cell.system == system]
        hover = f"at %{{x}}: %{{y:.3f}} {unit}"
        drawn = line(system, colour_of(system), [x for x, _ in own], [y for _, y in own], hover)
        traces.append(drawn | {"mode": "lines+markers", "marker": {"color": colour_of(system), "size": 8}})
    rows: list[list[Value]] = [[x, cell.system, rounded(y)] for x, cell, y in known]
    words = all(isinstance(x, str) for x, _, _ in known)
    x_axis = axis(unit_of(key), type="category" if words else "linear")
    layout = {"xaxis": x_axis, "yaxis": axis(unit, rangemode="tozero")}
    return Variant(traces, layout, [unit_of(key), "system", unit], rows)
