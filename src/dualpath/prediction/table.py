"""A prediction beside its measurement: job completion times and mean times to first token, and how far off they are."""

from rich.table import Table

from dualpath.prediction.machine import MachineRates
from dualpath.report.result_file import ResultFile, Run


def comparison_table(measured: ResultFile, predicted: ResultFile, rates: MachineRates) -> Table:
    """A row a run; errors are of the prediction, relative to what was measured.

    `machine`: how many times as long the cores were taken to need as when calibrated.
    """
    table = Table(title=f"{measured.name}: measured and predicted")
    table.add_column("run")
    for column in ("machine", "JCT", "predicted", "error", "TTFT", "predicted", "error"):
        table.add_column(column, justify="right")
    for one, other in zip(measured.runs, predicted.runs, strict=True):
        ttft_s, predicted_ttft_s = mean_ttft_s(one), mean_ttft_s(other)
        table.add_row(
            _name(one),
            f"{(other.reference_ns or 0.0) / rates.reference_ns:.2f}×",
            *_pair(one.jct_s, other.jct_s),
            *(_pair(ttft_s, predicted_ttft_s) if ttft_s and predicted_ttft_s else ("-", "-", "-")),
        )
    return table


def mean_ttft_s(run: Run) -> float | None:
    """None for a run that kept no turns."""
    turns = run.turn_results
    return sum(turn.ttft_s for turn in turns) / len(turns) if turns else None


def _pair(measured_s: float, predicted_s: float) -> tuple[str, str, str]:
    return f"{measured_s:.2f} s", f"{predicted_s:.2f} s", f"{predicted_s / measured_s - 1:+.1%}"


def _name(run: Run) -> str:
    parameters = "".join(
        f" {name}={value:g}" if isinstance(value, float) else f" {name}={value}"
        for name, value in run.parameters.items()
    )
    repeat = f" #{run.repeat + 1}" if run.repeat else ""
    return f"{run.topology} {run.system}{parameters}{repeat}"
