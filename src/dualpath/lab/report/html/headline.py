"""The top of the page: a card for each topology, what the figures mean and what to distrust about them."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from dualpath.core.systems import BASELINE
from dualpath.lab.report.html.runs import source_name
from dualpath.lab.report.palette import colour_of
from dualpath.lab.report.summary import explain
from dualpath.results.cells import Cell, Comparison, comparisons, systems_of
from dualpath.results.file import ResultFile, Run
from dualpath.results.roles import contenders, foremost, oracle_among

ENOUGH_REPEATS = 3
COMPUTE_BOUND = 1.15
"""If free I/O gains less than this, the job does not wait for storage."""
MAX_NAMED = 4
"""Runs named in a sentence."""
BEYOND_IDEAL = 1.05
"""Share of the ideal that is more than chance."""


class Card(msgspec.Struct, frozen=True):
    """One topology's figures, as text."""

    title: str
    figure: str
    caption: str
    colour: str
    facts: list[tuple[str, str]]


def cards_of(cells: Sequence[Cell]) -> list[Card]:
    """Makes a card for each topology of each file."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.setting.place, []).append(cell)
    return [_card(title, group) for title, group in groups.items()]


def _card(title: str, cells: list[Cell]) -> Card:
    compared = [cell for cell in cells if cell.median.ratio_to_basic is not None]
    system = foremost(systems_of(compared))
    if system is None:
        return _time_card(title, cells)
    chosen = [cell for cell in compared if cell.system == system]
    runs = [cell.median for cell in chosen]
    balance, hits = _balance_and_hits(runs)
    if all(run.agents_per_s is not None for run in runs):
        gains = [_ttft_gain(one.cells[system], one) for one in comparisons(cells) if system in one.cells]
        what, caption = f"{BASELINE}'s mean TTFT over {system}'s", f"agents arriving, over {len(chosen)} settings"
        return Card(
            f"{title}: {what}", _span(gains, "{:.2f}", "×"), caption, colour_of(system), [balance, hits, _jct(runs)]
        )
    figure = _span([run.ratio_to_basic for run in runs], "{:.2f}", "×")
    facts = [("ideal", _ideal(runs)), balance, hits, _jct(runs)]
    return Card(f"{title}: {system} over {BASELINE}", figure, _repeats(chosen), colour_of(system), facts)


def _ttft_gain(cell: Cell, peers: Comparison) -> float | None:
    """Compares TTFTs, because the arrival rate sets how long the agents take in all."""
    basic = peers.cells.get(BASELINE)
    slow_s, fast_s = None if basic is None else basic.median.mean_ttft_s, cell.median.mean_ttft_s
    return slow_s / fast_s if slow_s and fast_s else None


def _time_card(title: str, cells: list[Cell]) -> Card:
    """Makes a card with the time of the last system, for runs that can't be compared with the baseline."""
    system = foremost(systems_of(cells)) or cells[-1].system
    chosen = [cell for cell in cells if cell.system == system]
    runs = [cell.median for cell in chosen]
    ttft = ("TTFT p50", _span([run.ttft_p50_s for run in runs], "{:.2f}", " s"))
    turns = ("turns", _span([float(run.turns) for run in runs], "{:,.0f}"))
    facts = [ttft, *_balance_and_hits(runs), turns]
    return Card(f"{title}: JCT of {system}", _jct(runs)[1], _repeats(chosen), colour_of(system), facts)


def _balance_and_hits(runs: list[Run]) -> tuple[tuple[str, str], tuple[str, str]]:
    balance = _span([run.snic_max_over_avg for run in runs], "{:.2f}")
    return ("SNIC max/avg", balance), ("hit rate", _span([run.hit_rate for run in runs], "{:.1%}"))


def _jct(runs: list[Run]) -> tuple[str, str]:
    return "JCT", _span([run.jct_s for run in runs], "{:.1f}", " s")


def _ideal(runs: list[Run]) -> str:
    ideal = _span([run.ideal_ratio for run in runs], "{:.2f}", "×")
    reached = _span([run.ratio_to_ideal for run in runs], "{:.0%}")
    return f"{ideal} ({reached} reached)" if reached != "–" else ideal


def _repeats(cells: list[Cell]) -> str:
    """Says how many runs the figure rests on, and their spread."""
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
    """Says what the figures mean; for a sweep, where each topology gained least and most."""
    sentences: list[str] = []
    for at, result in enumerate(results):
        name = source_name(results, at)
        own = [cell for cell in cells if cell.setting.source == name]
        if len(comparisons(own)) == len({cell.setting.topology for cell in own}):
            sentences += [f"{name}: {sentence}" if name else sentence for sentence in explain(result)]
        else:
            sentences += _extremes(own)
    return sentences


def _extremes(cells: list[Cell]) -> Iterator[str]:
    for topology in dict.fromkeys(cell.setting.topology for cell in cells):
        own = [cell for cell in cells if cell.setting.topology == topology]
        for system in contenders(systems_of(own)):
            known = [
                (ratio, cell.setting.label)
                for cell in own
                if cell.system == system and (ratio := cell.median.ratio_to_basic) and cell.median.agents_per_s is None
            ]
            if known:
                least, most = min(known), max(known)
                yield (
                    f"{system} gains most over {BASELINE} at {most[1]} ({most[0]:.2f}×), least at {least[1]} "
                    f"({least[0]:.2f}×)."
                )


def cautions(results: Sequence[ResultFile], cells: Sequence[Cell]) -> list[str]:
    """Says what to distrust."""
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
        found.append("Some turns have no stages: all of their time to the first token is shown as prefill.")
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
    for one in comparisons(cells):
        basic = one.cells.get(BASELINE)
        for system in contenders(one.cells) if basic is not None else ():
            cell = one.cells[system]
            if basic is None or min(len(basic.whole), len(cell.whole)) < 2:
                continue
            if cell.jct.most >= basic.jct.least and cell.jct.least <= basic.jct.most:
                found.append(
                    f"{one.setting.label}: the repeats of {system} and {BASELINE} overlap; their difference may be "
                    "chance."
                )
    return found


def _compute_bound(cells: Sequence[Cell]) -> list[str]:
    found = []
    for one in comparisons(cells):
        basic, oracle = one.complete(BASELINE), one.complete(oracle_among(one.cells))
        if basic is not None and oracle is not None and basic.jct_s / oracle.jct_s < COMPUTE_BOUND:
            found.append(
                f"{one.setting.label}: {oracle.system}, whose I/O is free, is only {basic.jct_s / oracle.jct_s:.2f}× "
                f"{BASELINE}; the job waits for compute, not for storage, and there is little for dual-path to gain."
            )
    return found


def _beyond_ideal(cells: Sequence[Cell]) -> list[str]:
    beyond = [(cell, cell.median.ratio_to_ideal) for cell in cells]
    return [
        f"{cell.setting.label}: {cell.system} beats its ideal by {share - 1:.0%}; its runs and {BASELINE}'s can't have "
        "been under the same conditions."
        for cell, share in beyond
        if share is not None and share > BEYOND_IDEAL
    ]
