"""Sets a prediction beside its measurement: the same runs, simulated from the measurement's own description.

Cells are matched by topology, system and parameters; both sides are medians over their repeats.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from dualpath.lab.report.html.chart import Chart, Section, Value, Variant, axis, rounded
from dualpath.lab.report.palette import colour_of
from dualpath.results.cells import Cell, cells_of
from dualpath.results.file import ResultFile, ResultFileError, Run


class Pair(msgspec.Struct, frozen=True):
    """A measured cell with the median of the runs that predict it."""

    cell: Cell
    predicted: Run

    @property
    def jct_error(self) -> float:
        """Predicted over measured JCT, less one."""
        return self.predicted.jct_s / self.cell.median.jct_s - 1

    @property
    def ttft_error(self) -> float | None:
        measured_s, predicted_s = self.cell.median.mean_ttft_s, self.predicted.mean_ttft_s
        return predicted_s / measured_s - 1 if measured_s and predicted_s is not None else None


def pairs_of(cells: Sequence[Cell], prediction: ResultFile | None) -> list[Pair]:
    """Pairs every predicted cell that lost no turns. Raises ResultFileError for a prediction of other runs."""
    if prediction is None:
        return []
    predicted = {_key(cell): cell for cell in cells_of(prediction)}
    known = [cell for cell in cells if _key(cell) in predicted]
    if not known:
        raise ResultFileError(
            f"the prediction {prediction.name!r} has none of the measured runs' topologies, systems and parameters; "
            "give one made from this measurement (dualpath simulate --like)"
        )
    return [Pair(cell, predicted[_key(cell)].median) for cell in known if cell.whole and predicted[_key(cell)].whole]


def prediction_sentence(pairs: Sequence[Pair]) -> str | None:
    """Says how far off the predictions are, over all pairs; None without any."""
    if not pairs:
        return None
    text = f"Predicted job completion times are off by {_off([pair.jct_error for pair in pairs])}"
    ttft = [pair.ttft_error for pair in pairs if pair.ttft_error is not None]
    if ttft:
        text += f", mean times to first token by {_off(ttft)}"
    return f"{text} ({len(pairs)} pairs of setting and system)."


def _off(errors: Sequence[float]) -> str:
    sizes = np.abs(errors)
    return f"{sizes.mean():.1%} in the mean and {sizes.max():.1%} at most"


def prediction_section(pairs: Sequence[Pair]) -> Section:
    """Makes bars of measured (filled) and predicted (outlined) times, with the error of each."""
    jct = [(pair, pair.cell.median.jct_s, pair.predicted.jct_s) for pair in pairs]
    ttft = [(pair, pair.cell.median.mean_ttft_s, pair.predicted.mean_ttft_s) for pair in pairs]
    known = [(pair, measured_s, predicted_s) for pair, measured_s, predicted_s in ttft if measured_s and predicted_s]
    charts = [
        Chart("predicted-jct", "Job completion time", "", [_side_by_side(jct)]),
        Chart("predicted-ttft", "Mean time to first token", "", [_side_by_side(known)]),
    ]
    text = (
        "Filled: measured. Outlined: simulated, with its error. Settings that lost turns on either side are left out."
    )
    return Section("prediction", "Prediction", text, "", ["all"], charts)


def _side_by_side(rows: Sequence[tuple[Pair, float, float]]) -> Variant | None:
    if not rows:
        return None
    labels = [f"{pair.cell.setting.label}<br>{pair.cell.system}" for pair, _, _ in rows]
    colours = [colour_of(pair.cell.system) for pair, _, _ in rows]
    errors = [predicted_s / measured_s - 1 for _, measured_s, predicted_s in rows]
    measured = {
        "type": "bar",
        "name": "measured",
        "x": labels,
        "y": [rounded(measured_s) for _, measured_s, _ in rows],
        "marker": {"color": colours},
        "hovertemplate": "%{x}<br>measured %{y:.3f} s<extra></extra>",
    }
    predicted = {
        "type": "bar",
        "name": "predicted",
        "x": labels,
        "y": [rounded(predicted_s) for _, _, predicted_s in rows],
        "text": [f"{error:+.0%}" for error in errors],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": "rgba(0,0,0,0)", "line": {"color": colours, "width": 2.5}},
        "hovertemplate": "%{x}<br>predicted %{y:.3f} s (%{text})<extra></extra>",
    }
    table: list[list[Value]] = [
        [pair.cell.setting.label, pair.cell.system, rounded(measured_s), rounded(predicted_s), f"{error:+.1%}"]
        for (pair, measured_s, predicted_s), error in zip(rows, errors, strict=True)
    ]
    layout = {"barmode": "group", "xaxis": axis(""), "yaxis": axis("seconds", rangemode="tozero")}
    return Variant([measured, predicted], layout, ["setting", "system", "measured s", "predicted s", "error"], table)


def _key(cell: Cell) -> tuple[str, str, frozenset[tuple[str, float | str]]]:
    return cell.setting.topology, cell.system, frozenset(cell.setting.parameters)
