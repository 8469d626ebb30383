"""An experiment's findings, in sentences that a reader can check against its table."""

from collections.abc import Callable

import msgspec

from dualpath.core.systems import BASELINE
from dualpath.lab.report.balance import Balance, attention_balance, snic_balance
from dualpath.lab.report.summary import gains, range_text, soundness
from dualpath.results.cells import Cell, Comparison, cells_of, comparisons
from dualpath.results.file import ResultFile, Run
from dualpath.results.roles import contenders, foremost, oracle_among, reading_nics
from dualpath.results.turns import mean_stages_s

TIE_SHARE = 0.1
"""Largest relative difference of two job completion times that tie."""
BINDS_RATIO = 1.1
"""Ideal ratio from which storage reads bind the job."""
LEAST_OF_IDEAL, LEAST_OF_BASIC = 0.9, 0.98
WINDOW_S = 2.0
"""Window of balances over time."""
PAPER_ABLATION_PERCENT = {"basic-layerwise": -17.21, "dualpath-rr": -38.19, "dualpath": -45.62}
"""Change of the JCT against basic, DS 660B, MaxLen 64K (paper §10)."""


class NicMatch(msgspec.Struct, frozen=True):
    """Two runs that read with equally many storage NICs."""

    first: str
    second: str
    nics: int
    jct_ratio: float
    """The first run's JCT over the second's."""

    @property
    def ties(self) -> bool:
        return abs(self.jct_ratio - 1) <= TIE_SHARE


def nic_matches(result: ResultFile) -> list[NicMatch]:
    """Returns every pair of runs that read with equally many storage NICs, of the baseline and the foremost contender.

    It leaves out settings where an oracle shows that storage does not bind: there, NICs do not decide.
    """
    found: list[tuple[str, int, float]] = []
    for one in comparisons(cells_of(result)):
        ideal = _bounded_ideal(one)
        if ideal is not None and ideal < BINDS_RATIO:
            continue
        for system in (BASELINE, foremost(one.cells)):
            run = one.complete(system)
            if run is not None:
                found.append((f"{run.system} {run.topology}", reading_nics(run.system, run.topology), run.jct_s))
    return [
        NicMatch(first, second, nics, first_s / second_s)
        for index, (first, nics, first_s) in enumerate(found)
        for second, other_nics, second_s in found[index + 1 :]
        if nics == other_nics
    ]


def pairs(result: ResultFile) -> list[str]:
    """Says whether pairs of equal storage bandwidth tie, which agent reads most, and the gains."""
    return [*ties(result), *gains(result)]


def ties(result: ResultFile) -> list[str]:
    """Says whether pairs of equal storage bandwidth tie, and which agent reads most."""
    return [*map(_match_sentence, nic_matches(result)), *longest_agent(result)]


def _match_sentence(match: NicMatch) -> str:
    verdict = "they tie" if match.ties else f"no tie: more than {TIE_SHARE:.0%} apart"
    nics = "1 storage NIC" if match.nics == 1 else f"{match.nics} storage NICs"
    return f"{match.first} and {match.second}, both reading with {nics}: JCT ratio {match.jct_ratio:.2f}; {verdict}."


def real_sessions(result: ResultFile) -> list[str]:
    """Says whether a contender reaches the ideal where storage binds, and loses nothing elsewhere; then the pairs.

    Only an oracle, whose reads are free, can tell whether storage binds.
    """
    verdicts = [
        _verdict(one, run)
        for one in comparisons(cells_of(result))
        for system in contenders(one.cells)
        if (run := one.complete(system)) is not None
    ]
    return [*filter(None, verdicts), *ties(result), *soundness(result)]


def _bounded_ideal(one: Comparison) -> float | None:
    """Returns the ideal ratio to the baseline; None without an oracle to bound it, or without a contender."""
    run = one.complete(foremost(one.cells))
    return None if run is None or one.complete(oracle_among(one.cells)) is None else run.ideal_ratio


def longest_agent(result: ResultFile) -> list[str]:
    """Names the agent that reads most: its turns follow one another, which bounds systems that read by one NIC."""
    run = next((run for run in result.runs if not run.errors and run.cluster is not None), None)
    rate = result.configuration.snic_rate
    if run is None or run.cluster is None or rate is None:
        return []
    kv, read_bytes = run.cluster.kv, dict[str, int]()
    for turn in run.turn_results:
        read_bytes[turn.trajectory] = read_bytes.get(turn.trajectory, 0) + kv.hit_bytes(turn.loaded_tokens)
    agent, most = max(read_bytes.items(), key=lambda item: item[1], default=("", 0))
    if not most:
        return []
    sentence = (
        f"{agent} reads {most / 1e6:.0f} of {sum(read_bytes.values()) / 1e6:.0f} MB, one turn after another: "
        f"{most / rate:.1f} s with one NIC, which no system that reads a request with one NIC can undercut."
    )
    return [sentence]


def _verdict(one: Comparison, run: Run) -> str:
    if run.ratio_to_basic is None or run.ideal_ratio is None or run.ratio_to_ideal is None:
        return ""
    gained = f"{run.system} is {run.ratio_to_basic:.2f}× {BASELINE}"
    if _bounded_ideal(one) is None:
        return f"{one.setting.label}: {gained}; without an oracle the ideal is not known."
    ideal = f"(ideal {run.ideal_ratio:.2f}×)"
    if run.ideal_ratio >= BINDS_RATIO:
        held = "holds" if run.ratio_to_ideal >= LEAST_OF_IDEAL else "missed"
        reached = f"{run.ratio_to_ideal:.0%} of the ideal: at least {LEAST_OF_IDEAL:.0%} {held}"
        return f"{one.setting.label}: storage binds {ideal}; {gained}, {reached}."
    held = "holds" if run.ratio_to_basic >= LEAST_OF_BASIC else "missed"
    return f"{one.setting.label}: storage does not bind {ideal}; {gained}: at least {LEAST_OF_BASIC:.2f}× {held}."


def jct_change_percent(run: Run) -> float | None:
    """Returns the change of the JCT against the baseline's median; negative is faster."""
    return None if run.ratio_to_basic is None else (1 / run.ratio_to_basic - 1) * 100


def ablation(result: ResultFile) -> list[str]:
    """Gives each contender's change of JCT against the baseline, with the paper's if it has one."""
    sentences = []
    for cell in cells_of(result):
        change = cell.spread(jct_change_percent) if contenders([cell.system]) else None
        if change is not None:
            paper = PAPER_ABLATION_PERCENT.get(cell.system)
            theirs = "" if paper is None else f" (paper, DS 660B at 64K: {paper:+.1f} %)"
            changed = f"{cell.system} changes {BASELINE}'s time by {change.median:+.1f} %{theirs}"
            sentences.append(f"{cell.setting.label}: {changed}.")
    return [*sentences, *soundness(result)]


def arrivals(result: ResultFile) -> list[str]:
    """Gives each system's TTFT at each rate."""
    sentences = []
    for one in comparisons(cells_of(result)):
        told = [
            f"{system} {run.ttft_p50_s:.2f} s (p99 {run.ttft_p99_s:.2f})"
            for system in one.cells
            if (run := one.complete(system)) is not None and run.ttft_p50_s is not None and run.ttft_p99_s is not None
        ]
        sentences.append(f"{one.setting.label}: median TTFT {', '.join(told)}.")
    return [*sentences, *soundness(result)]


def stages(result: ResultFile) -> list[str]:
    """Names the largest stage of every system's time to first token."""
    sentences = []
    for cell in cells_of(result):
        found = mean_stages_s([turn for run in cell.counted for turn in run.turn_results])
        if found is not None:
            total_s = sum(found.values())
            largest = max(found, key=lambda stage: found[stage])
            sentences.append(
                f"{cell.setting.label}: {cell.system} takes {total_s:.2f} s to a first token on average, "
                f"{found[largest] / total_s:.0%} of it {largest}."
            )
    return [*sentences, *soundness(result)]


def snic(result: ResultFile) -> list[str]:
    """Gives max over average of the storage NICs."""
    return _balances(result, snic_balance, "the busiest storage NIC receives")


def attention(result: ResultFile) -> list[str]:
    """Gives max over average of prefill attention."""
    return _balances(result, attention_balance, "the busiest PE has")


def _balances(result: ResultFile, measure: Callable[[Run, float], Balance | None], what: str) -> list[str]:
    def overall(run: Run) -> float | None:
        found = measure(run, WINDOW_S)
        return None if found is None else found.overall

    def sentence(cell: Cell) -> str:
        spread = cell.spread(overall)
        if spread is None:
            return ""
        told = f"{what} {spread.median:.2f}× the average{range_text(cell, overall)} in a window of {WINDOW_S:g} s"
        return f"{cell.setting.label}: under {cell.system} {told}."

    return [*filter(None, map(sentence, cells_of(result))), *soundness(result)]
