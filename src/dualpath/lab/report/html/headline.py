"""The top of the page: a card for each topology, what the figures mean and what to distrust about them."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from dualpath.lab.report.html.predictions import mean_ttft_s
from dualpath.lab.report.html.settings import Cell, settings_of, source_name
from dualpath.lab.report.palette import colour_of, foremost
from dualpath.lab.report.summary import explain
from dualpath.results.file import ResultFile, Run

ENOUGH_REPEATS = 3
COMPUTE_BOUND = 1.15
"""Where free I/O would not even gain this, storage is not what the job waits for."""
MAX_NAMED = 4
"""Of runs in a sentence."""
BEYOND_IDEAL = 1.05
"""Of the ideal: more than chance."""


class Card(msgspec.Struct, frozen=True):
    """One topology's figures, as text."""

    title: str
    figure: str
    caption: str
    colour: str
    facts: list[tuple[str, str]]


def cards_of(cells: Sequence[Cell]) -> list[Card]:
    """A card for each topology of each file."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.setting.source, cell.setting.topology), []).append(cell)
    return [_card(" ".join(filter(None, name)), group) for name, group in groups.items()]


def _card(title: str, cells: list[Cell]) -> Card:
    compared = {cell.system for cell in cells if cell.median.run.ratio_to_basic is not None}
    system = foremost(compared)
    if system is None:
        return _time_card(title, cells)
    chosen = [cell for cell in cells if cell.system == system and cell.median.run.ratio_to_basic is not None]
    runs = [cell.median.run for cell in chosen]
    facts = [("SNIC max/avg", _span([run.snic_max_over_avg for run in runs], "{:.2f}"))]
    facts.insert(0, ("ideal", _ideal(runs)))
    facts.append(("hit rate", _span([run.hit_rate for run in runs], "{:.1%}")))
    facts.append(("JCT", _span([run.jct_s for run in runs], "{:.1f}", " s")))
    if all(run.agents_per_s is not None for run in runs):
        gains = [_ttft_gain(cells, cell) for cell in chosen]
        figure, what = _span(gains, "{:.2f}", "×"), f"basic's mean TTFT over {system}'s"
        return Card(
            f"{title}: {what}", figure, f"agents arriving, over {len(chosen)} settings", colour_of(system), facts[1:]
        )
    figure = _span([run.ratio_to_basic for run in runs], "{:.2f}", "×")
    return Card(f"{title}: {system} over basic", figure, _repeats(chosen), colour_of(system), facts)


def _ttft_gain(cells: Sequence[Cell], cell: Cell) -> float | None:
    """What agents that arrive at a rate see; how long they take in all is up to the rate."""
    basic = _peer(cells, cell, "basic")
    if basic is None:
        return None
    slow_s, fast_s = mean_ttft_s(basic.median.run), mean_ttft_s(cell.median.run)
    return slow_s / fast_s if slow_s and fast_s else None


def _time_card(title: str, cells: list[Cell]) -> Card:
    """Where nothing can be compared with basic: the time of the last system that was run."""
    system = foremost({cell.system for cell in cells}) or cells[-1].system
    runs = [cell.median.run for cell in cells if cell.system == system]
    facts = [
        ("TTFT p50", _span([run.ttft_p50_s for run in runs], "{:.2f}", " s")),
        ("SNIC max/avg", _span([run.snic_max_over_avg for run in runs], "{:.2f}")),
        ("hit rate", _span([run.hit_rate for run in runs], "{:.1%}")),
        ("turns", _span([float(run.turns) for run in runs], "{:,.0f}")),
    ]
    caption = _repeats([cell for cell in cells if cell.system == system])
    return Card(
        f"{title}: JCT of {system}",
        _span([run.jct_s for run in runs], "{:.1f}", " s"),
        caption,
        colour_of(system),
        facts,
    )


def _ideal(runs: list[Run]) -> str:
    ideal = _span([run.ideal_ratio for run in runs], "{:.2f}", "×")
    reached = _span([run.ratio_to_ideal for run in runs], "{:.0%}")
    return f"{ideal} ({reached} reached)" if reached != "–" else ideal


def _repeats(cells: list[Cell]) -> str:
    """How many runs the figure rests on, and their spread."""
    if len(cells) > 1:
        return f"over {len(cells)} settings"
    runs = cells[0].whole
    ratios = [run.ratio_to_basic for run in runs if run.ratio_to_basic is not None]
    if len(runs) < 2:
        return "a single run"
    if not ratios:
        return f"median of {len(runs)} runs"
    return f"median of {len(runs)} runs, {min(ratios):.2f}× to {max(ratios):.2f}×"


def _span(values: Iterable[float | None], form: str, unit: str = "") -> str:
    known = sorted(
        {form.format(value): value for value in values if value is not None}.items(), key=lambda item: item[1]
    )
    if not known:
        return "–"
    low, high = known[0][0], known[-1][0]
    return f"{low}{unit}" if low == high else f"{low} – {high}{unit}"


def meanings(results: Sequence[ResultFile], cells: Sequence[Cell]) -> list[str]:
    """What the figures mean; of a sweep, where each topology gained least and most."""
    sentences: list[str] = []
    for at, result in enumerate(results):
        name = source_name(results, at)
        own = [cell for cell in cells if cell.setting.source == name]
        if len(settings_of(own)) == len({cell.setting.topology for cell in own}):
            sentences += [f"{name}: {sentence}" if name else sentence for sentence in explain(result)]
        else:
            sentences += _extremes(own)
    return sentences


def _extremes(cells: list[Cell]) -> Iterator[str]:
    for topology in dict.fromkeys(cell.setting.topology for cell in cells):
        known = [
            (cell.median.run.ratio_to_basic, cell)
            for cell in cells
            if cell.system == "dualpath"
            and cell.setting.topology == topology
            and cell.median.run.ratio_to_basic
            and cell.median.run.agents_per_s is None
        ]
        if known:
            least, most = min(known, key=lambda one: one[0] or 0), max(known, key=lambda one: one[0] or 0)
            yield (
                f"dualpath gains most over basic at {most[1].setting.label} ({most[0]:.2f}×), least at "
                f"{least[1].setting.label} ({least[0]:.2f}×)."
            )


def cautions(results: Sequence[ResultFile], cells: Sequence[Cell]) -> list[str]:
    """What to distrust."""
    found = [*_failed(cells), *_few_repeats(cells), *_overlaps(cells), *_compute_bound(cells), *_beyond_ideal(cells)]
    runs = [run for result in results for run in result.runs]
    measured = [run for result in results for run in result.runs if result.kind != "prediction"]
    if any(run.cluster is not None and run.cluster.links == "emulated" for run in measured):
        found.append("Links are emulated: real bytes, held to the given rates by the traffic manager on one machine.")
    if any(run.agents_per_s is not None for run in runs):
        found.append(
            "Agents arrive at a given rate: compare latencies, not job completion times, which the arrivals set."
        )
    if any(turn.timings is None for run in runs for turn in run.turn_results):
        found.append("Some turns come without stages: all of their time to the first token is shown as prefill.")
    if any(result.kind == "prediction" for result in results):
        found.append("These runs were simulated, not measured.")
    if not any(run.turn_results for run in runs):
        found.append("The file keeps no turns: there are no distributions and no timeline.")
    return found


def _failed(cells: Sequence[Cell]) -> list[str]:
    lost = [(cell, sum(run.errors for run in cell.runs)) for cell in cells]
    texts = [f"{cell.setting.label} {cell.system} ({count})" for cell, count in lost if count]
    if not texts:
        return []
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    named = "; ".join(texts[:MAX_NAMED]) + more
    return [f"Turns failed in {named}. Runs that lost turns did less work; their times compare with nothing."]


def _few_repeats(cells: Sequence[Cell]) -> list[str]:
    fewest = min((len(cell.whole) for cell in cells), default=ENOUGH_REPEATS)
    if fewest >= ENOUGH_REPEATS:
        return []
    least = "no complete run" if fewest == 0 else "a single run" if fewest == 1 else f"{fewest} runs"
    return [f"Some figures rest on {least}: repeat at least {ENOUGH_REPEATS} times before trusting small differences."]


def _overlaps(cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in cells:
        basic = _peer(cells, cell, "basic")
        if basic is None or cell.system != "dualpath" or min(len(basic.whole), len(cell.whole)) < 2:
            continue
        if cell.median.jct_max_s >= basic.median.jct_min_s and cell.median.jct_min_s <= basic.median.jct_max_s:
            found.append(
                f"{cell.setting.label}: the repeats of dualpath and basic overlap; their difference may be chance."
            )
    return found


def _compute_bound(cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in cells:
        oracle = _peer(cells, cell, "oracle")
        if cell.system != "basic" or oracle is None or cell.median.run.errors or oracle.median.run.errors:
            continue
        gain = cell.median.run.jct_s / oracle.median.run.jct_s
        if gain < COMPUTE_BOUND:
            found.append(
                f"{cell.setting.label}: oracle, whose I/O is free, is only {gain:.2f}× basic; the job waits for "
                "compute, not for storage, and there is little for dual-path to gain."
            )
    return found


def _beyond_ideal(cells: Sequence[Cell]) -> list[str]:
    beyond = [(cell, cell.median.run.ratio_to_ideal) for cell in cells]
    return [
        f"{cell.setting.label}: {cell.system} beats its ideal by {share - 1:.0%}; its runs and basic's can't have been "
        "under the same conditions."
        for cell, share in beyond
        if share is not None and share > BEYOND_IDEAL
    ]


def _peer(cells: Sequence[Cell], cell: Cell, system: str) -> Cell | None:
    return next((other for other in cells if (other.setting, other.system) == (cell.setting, system)), None)
