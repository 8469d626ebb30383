"""Makes one HTML file of result files that needs nothing else: no server, no network, no other file.

Theory of operation. Python works everything out: cards, sentences, every chart (as a plotly figure without theme
colours) and one column per fact about turns. The page holds the words as plain HTML, and the rest as one JSON
document::

    result files ──► cells ──► cards, sentences ────────────────► HTML ─┐
                       ├────► charts, tables ──┐                        ├──► report.html
                       └────► turns ───────────┴► JSON ──► gzip, base64 ┤
    plotly.js (from the plotly package) ────────────────► gzip, base64 ─┤
    templates/*.css, *.js ──────────────────────────────────────────────┘

The page's own script unpacks both, draws what comes into view, sorts, filters and zooms. A content security policy in
the page forbids any request, so a file from elsewhere can't tell anyone that it was read.
"""

import base64
import gzip
import importlib.metadata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dualpath.lab.report.html.chart import Section
from dualpath.lab.report.html.headline import cards_of, cautions, meanings
from dualpath.lab.report.html.latency import breakdown_section, latency_section
from dualpath.lab.report.html.predictions import Pair, pairs_of, prediction_section, prediction_sentence
from dualpath.lab.report.html.provenance import provenance
from dualpath.lab.report.html.runs import RUN_COLUMNS, Entry, cells_of_files, entries_of, run_rows, source_name
from dualpath.lab.report.html.times import sweep_section, times_section
from dualpath.lab.report.html.traffic import rates_section, traffic_section
from dualpath.lab.report.html.turn_columns import MAX_TURNS, TURN_COLUMNS, Turns, turns_of
from dualpath.lab.report.palette import STAGE_COLOURS
from dualpath.results.cells import Cell
from dualpath.results.file import ResultFile
from dualpath.results.turns import STAGES
from dualpath.spec.whole_file import write_whole

SCRIPTS = ("table.js", "charts.js", "timeline_view.js", "timeline.js", "page.js")


def write_report(
    result: ResultFile | Sequence[ResultFile], out: Path, prediction: ResultFile | None = None, at_most: int = MAX_TURNS
) -> None:
    """Writes the report of one or more results to `out`, whose directory must exist.

    Beyond `at_most` turns, whole agents are left out of the table and the timeline. Raises OSError, and ResultFileError
    for a prediction of other runs.
    """
    results = [result] if isinstance(result, ResultFile) else list(result)
    write_whole(out, render(results, prediction, at_most).encode())


def render(results: Sequence[ResultFile], prediction: ResultFile | None = None, at_most: int = MAX_TURNS) -> str:
    """Returns the page. Raises ResultFileError for a prediction of other runs, ValueError for no runs."""
    entries = entries_of(results)
    if not entries:
        raise ValueError("nothing to report: the result files have no runs")
    cells = cells_of_files(results)
    pairs = pairs_of(cells, prediction)
    turns = turns_of(entries, at_most)
    sections = _sections(entries, cells, pairs, results)
    said = prediction_sentence(pairs)
    environment = Environment(
        loader=PackageLoader("dualpath.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=" · ".join(dict.fromkeys(result.name for result in results)),
        cards=cards_of(cells),
        meanings=meanings(results, cells) + ([said] if said else []),
        cautions=cautions(results, cells) + _sampling(turns),
        sections=sections,
        provenance=provenance,
        results=[(source_name(results, at), result) for at, result in enumerate(results)],
        prediction=prediction,
        failures=[(entry.label, message) for entry in entries for message in entry.run.error_messages],
        turns=turns,
        versions=_versions(),
        css=_source("report.css"),
        script=Markup("\n").join(_source(name) for name in SCRIPTS),
        plotly=_plotly(),
        document=_packed(msgspec.json.encode(_document(entries, sections, turns))),
    )


def _sections(
    entries: Sequence[Entry], cells: Sequence[Cell], pairs: Sequence[Pair], results: Sequence[ResultFile]
) -> list[Section]:
    every = [
        times_section(cells),
        sweep_section(cells),
        traffic_section(cells),
        rates_section(entries, results),
        breakdown_section(cells),
        latency_section(cells),
        prediction_section(pairs),
    ]
    return [section for section in every if section.used]


def _document(entries: Sequence[Entry], sections: Sequence[Section], turns: Turns) -> dict[str, Any]:
    """Returns what the page's script reads."""
    return {
        "sections": sections,
        "runs": {"columns": RUN_COLUMNS, "rows": run_rows(entries), "labels": [entry.label for entry in entries]},
        "turns": {"columns": TURN_COLUMNS, "runs": turns.runs},
        "stages": [{"name": name, "colour": STAGE_COLOURS[name], "meaning": STAGES[name]} for name in STAGES],
    }


def _sampling(turns: Turns) -> list[str]:
    if turns.kept_turns == turns.all_turns:
        return []
    sentence = (
        f"The table and the timeline hold {turns.kept_turns:,} of {turns.all_turns:,} turns: whole agents, evenly left "
        "out. All charts are drawn from every turn."
    )
    return [sentence]


def _versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("dualpath", "plotly")]
    return ", ".join(found)


def _source(name: str) -> Markup:
    """Returns a stylesheet or script unchanged; it is ours and needs no escaping."""
    return Markup((Path(__file__).parents[1] / "templates" / name).read_text(encoding="utf-8"))


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs().encode())


def _packed(content: bytes) -> str:
    """Compresses with gzip (without a time stamp, so the same results give the same page), then encodes in base64."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()
