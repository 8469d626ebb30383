"""The page's runs, each with its place and label, and the table of runs."""

from collections.abc import Callable, Sequence

import msgspec

from dualpath.lab.report.html.chart import Value
from dualpath.results.cells import Cell, Setting, cells_of, settings_of
from dualpath.results.file import ResultFile, Run


class Entry(msgspec.Struct, frozen=True):
    """A run with its place on the page."""

    number: int
    source: int
    """Index of the result file."""
    setting: Setting
    run: Run
    label: str
    """``1P2D dualpath``, with the repeat's number if there are several."""


class Column(msgspec.Struct, frozen=True):
    """A column of a table that can be sorted and filtered."""

    key: str
    """Name in filters: ``ttft>500``."""
    label: str
    digits: int | None = None
    """Digits after the decimal point; None for text."""


_RUN_FIGURES: list[tuple[Column, Callable[[Entry], Value]]] = [
    (Column("setting", "setting"), lambda entry: entry.setting.label),
    (Column("system", "system"), lambda entry: entry.run.system),
    (Column("repeat", "repeat", 0), lambda entry: entry.run.repeat + 1),
    (Column("jct", "JCT s", 2), lambda entry: entry.run.jct_s),
    (Column("over", "over basic", 2), lambda entry: entry.run.ratio_to_basic),
    (Column("ideal", "of ideal %", 0), lambda entry: _times(entry.run.ratio_to_ideal, 100)),
    (Column("ttft50", "TTFT p50 s", 3), lambda entry: entry.run.ttft_p50_s),
    (Column("ttft99", "TTFT p99 s", 3), lambda entry: entry.run.ttft_p99_s),
    (Column("ttst50", "TTST p50 ms", 1), lambda entry: _times(entry.run.ttst_p50_s, 1e3)),
    (Column("ttst99", "TTST p99 ms", 1), lambda entry: _times(entry.run.ttst_p99_s, 1e3)),
    (Column("tpot50", "TPOT p50 ms", 1), lambda entry: _times(entry.run.tpot_p50_s, 1e3)),
    (Column("tpot99", "TPOT p99 ms", 1), lambda entry: _times(entry.run.tpot_p99_s, 1e3)),
    (Column("hit", "hit rate %", 1), lambda entry: entry.run.hit_rate * 100),
    (Column("maxavg", "SNIC max/avg", 3), lambda entry: entry.run.snic_max_over_avg),
    (Column("gb", "SNIC GB", 3), lambda entry: sum(entry.run.snic_bytes.values()) / 1e9),
    (Column("turns", "turns", 0), lambda entry: entry.run.turns),
    (Column("retries", "retries", 0), lambda entry: entry.run.retries),
    (Column("failed", "failed turns", 0), lambda entry: entry.run.errors),
    (Column("same", "same tokens %", 1), lambda entry: _times(entry.run.same_tokens_as_basic, 100)),
]
RUN_COLUMNS = [column for column, _ in _RUN_FIGURES]


def entries_of(results: Sequence[ResultFile]) -> list[Entry]:
    """Returns every run, in the order of the files and of their runs."""
    entries: list[Entry] = []
    for source, result in enumerate(results):
        repeated = any(run.repeat for run in result.runs)
        for run, setting in zip(result.runs, settings_of(result, source_name(results, source)), strict=True):
            label = f"{setting.label} {run.system}" + (f" #{run.repeat + 1}" if repeated else "")
            entries.append(Entry(len(entries), source, setting, run, label))
    return entries


def cells_of_files(results: Sequence[ResultFile]) -> list[Cell]:
    """Returns the cells of each file, one file after another."""
    return [cell for at, result in enumerate(results) for cell in cells_of(result, source_name(results, at))]


def source_name(results: Sequence[ResultFile], index: int) -> str:
    """Names a file on the page: empty if it is the only one; numbered if two have the same name."""
    names = [result.name for result in results]
    if len(names) == 1:
        return ""
    return names[index] if names.count(names[index]) == 1 else f"{names[index]} ({index + 1})"


def run_rows(entries: Sequence[Entry]) -> list[list[Value]]:
    """Returns a row per run, with a value for each of `RUN_COLUMNS`."""
    return [[figure(entry) for _, figure in _RUN_FIGURES] for entry in entries]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
