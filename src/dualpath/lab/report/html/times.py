"""Charts of job completion times: by setting and system, and along a parameter that the runs vary."""

from collections.abc import Callable, Sequence
from typing import Any

from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, rounded
from dualpath.lab.report.html.predictions import mean_ttft_s
from dualpath.lab.report.html.settings import Cell, Parameters, Setting, name_of, settings_of
from dualpath.lab.report.palette import colour_of
from dualpath.results.file import Run

ROOMY = 4
"""Settings in a chart whose bars have room for seconds too."""
MAX_TOGETHER = 8
"""Settings in one chart; with more, a chart for each topology."""


def times_section(cells: Sequence[Cell]) -> Section:
    """Bars by setting and system, with the range of the repeats; nothing for one bar, which a card tells as well."""
    if len(cells) < 2:
        return Section("times", "Job completion time", "", "", [], [])
    groups: dict[str, list[Cell]] = {"all": list(cells)}
    if len(settings_of(cells)) > MAX_TOGETHER:
        groups = {}
        for cell in cells:
            groups.setdefault(f"{cell.setting.source} {cell.setting.topology}".strip(), []).append(cell)
    note = (
        "Lower is better. Bars are medians, whiskers the range of the repeats, × the ratio to basic. The short line is "
        "dualpath's ideal: what pooling every storage NIC could give at best. A hatched run lost turns; its time "
        "compares with nothing."
    )
    chart = Chart(
        "jct", "From the first agent's start to the last one's end", note, [_bars(group) for group in groups.values()]
    )
    return Section("times", "Job completion time", "", "topology", list(groups), [chart])


def _bars(cells: list[Cell]) -> Variant:
    systems = list(dict.fromkeys(cell.system for cell in cells))
    brief = len(settings_of(cells)) > ROOMY
    traces: list[dict[str, Any]] = []
    for system in systems:
        own = [cell for cell in cells if cell.system == system]
        traces += [_bar(own), _figures_on_bar(own, brief)]
    ideal = [(cell, *_ideal_of(cell.median.run)) for cell in cells if cell.system == "dualpath"]
    known = [(cell, jct_s, ratio) for cell, jct_s, ratio in ideal if jct_s is not None]
    if known:
        traces.append(_ideal_trace(known))
    rows: list[list[Value]] = []
    for cell in cells:
        run = cell.median.run
        figures = (run.jct_s, cell.median.jct_min_s, cell.median.jct_max_s, run.ratio_to_basic, run.ratio_to_ideal)
        rows.append([cell.setting.label, cell.system, *map(rounded, figures), cell.median.repeats, run.errors])
    columns = ["setting", "system", "JCT s", "least s", "most s", "over basic", "of ideal", "repeats", "lost turns"]
    layout = {
        "barmode": "group",
        "scattermode": "group",
        "xaxis": axis(""),
        "yaxis": axis("seconds", rangemode="tozero"),
    }
    return Variant(traces, layout, columns, rows)


def _bar(cells: list[Cell]) -> dict[str, Any]:
    rows = [cell.median for cell in cells]
    return {
        "type": "bar",
        "name": cells[0].system,
        "offsetgroup": cells[0].system,
        "x": [_tick(cell) for cell in cells],
        "y": [rounded(row.run.jct_s) for row in rows],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [rounded(row.jct_max_s - row.run.jct_s) for row in rows],
            "arrayminus": [rounded(row.run.jct_s - row.jct_min_s) for row in rows],
            "visible": any(row.repeats > 1 for row in rows),
        },
        "marker": {
            "color": colour_of(cells[0].system),
            "pattern": {"shape": ["/" if row.run.errors else "" for row in rows]},
        },
        "hovertemplate": "%{x}<br><b>%{fullData.name}</b> %{y:.2f} s<extra></extra>",
    }


def _tick(cell: Cell) -> str:
    return cell.setting.label.replace(", ", "<br>")


def _figures_on_bar(cells: list[Cell], brief: bool) -> dict[str, Any]:
    """Over the whiskers, where plotly's own labels would be under them."""
    return {
        "type": "scatter",
        "mode": "text",
        "showlegend": False,
        "hoverinfo": "skip",
        "offsetgroup": cells[0].system,
        "x": [_tick(cell) for cell in cells],
        "y": [rounded(cell.median.jct_max_s) for cell in cells],
        "text": [_on_bar(cell.median.run, brief) for cell in cells],
        "textposition": "top center",
        "cliponaxis": False,
    }


def _on_bar(run: Run, brief: bool) -> str:
    if run.errors:
        return f"{run.errors} lost"
    ratio = "" if run.ratio_to_basic is None or run.system == "basic" else f"<b>{run.ratio_to_basic:.2f}×</b>"
    return ratio if brief else "<br>".join(filter(None, [ratio, f"{run.jct_s:.1f} s"]))


def _ideal_of(run: Run) -> tuple[float | None, float | None]:
    """The JCT and the ratio that the ideal stands for."""
    if not run.ideal_ratio or not run.ratio_to_basic:
        return None, None
    return run.jct_s * run.ratio_to_basic / run.ideal_ratio, run.ideal_ratio


def _ideal_trace(known: list[tuple[Cell, float, float | None]]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "dualpath's ideal",
        "offsetgroup": "dualpath",
        "x": [_tick(cell) for cell, _, _ in known],
        "y": [rounded(jct_s) for _, jct_s, _ in known],
        "customdata": [rounded(ratio, 3) for _, _, ratio in known],
        "marker": {"symbol": "line-ew", "size": 26, "line": {"width": 3}},
        "hovertemplate": "%{x}<br>ideal %{y:.2f} s (%{customdata:.2f}×)<extra></extra>",
    }


SWEPT: dict[str, tuple[str, Callable[[Cell], float | None]]] = {
    "Job completion time": ("seconds", lambda cell: cell.median.run.jct_s),
    "Over basic": ("×", lambda cell: cell.median.run.ratio_to_basic),
    "Mean time to first token": ("seconds", lambda cell: mean_ttft_s(cell.median.run)),
}


def sweep_section(cells: Sequence[Cell]) -> Section:
    """Lines along each parameter with more than one value, what else varies held fixed."""
    sweeps = _sweeps([cell for cell in cells if not cell.median.run.errors])
    charts = [
        Chart(f"sweep-{index}", title, "", [_lines(key, group, unit, figure) for (key, _), group in sweeps.items()])
        for index, (title, (unit, figure)) in enumerate(SWEPT.items())
    ]
    text = "Medians along a parameter that the runs vary; everything else in the choice's name is held fixed."
    return Section("sweeps", "Sweeps", text, "sweep", [label for _, label in sweeps], charts)


def _sweeps(cells: list[Cell]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for key in dict.fromkeys(key for cell in cells for key, _ in cell.setting.parameters):
        for cell in cells:
            if key in dict(cell.setting.parameters):
                found.setdefault((key, f"{name_of(key)}: {_fixed(cell.setting, key)}"), []).append(cell)
    return {name: group for name, group in found.items() if len({cell.setting for cell in group}) > 1}


def _fixed(setting: Setting, key: str) -> str:
    others: Parameters = tuple(item for item in setting.parameters if item[0] != key)
    texts = (
        f"{name_of(name)} {value:g}" if isinstance(value, float | int) else f"{name_of(name)} {value}"
        for name, value in others
    )
    return ", ".join([" ".join(filter(None, [setting.source, setting.topology])), *texts])


def _lines(key: str, cells: list[Cell], unit: str, figure: Callable[[Cell], float | None]) -> Variant | None:
    points = [(dict(cell.setting.parameters)[key], cell, figure(cell)) for cell in cells]
    known = [(x, cell, y) for x, cell, y in points if y is not None]
    if not known:
        return None
    traces = []
    for system in dict.fromkeys(cell.system for _, cell, _ in known):
        line = [(x, y) for x, cell, y in known if cell.system == system]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": system,
                "x": [x for x, _ in line],
                "y": [rounded(y) for _, y in line],
                "line": {"color": colour_of(system), "width": 2},
                "marker": {"color": colour_of(system), "size": 8},
                "hovertemplate": f"{name_of(key)} %{{x}}<br><b>{system}</b> %{{y:.3f}} {unit}<extra></extra>",
            }
        )
    rows: list[list[Value]] = [[x, cell.system, rounded(y)] for x, cell, y in known]
    words = all(isinstance(x, str) for x, _, _ in known)
    x_axis = axis(name_of(key), type="category" if words else "linear")
    layout = {"xaxis": x_axis, "yaxis": axis(unit, rangemode="tozero")}
    return Variant(traces, layout, [name_of(key), "system", unit], rows)
