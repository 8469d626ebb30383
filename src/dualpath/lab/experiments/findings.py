"""What an experiment found, in sentences that a reader can check against its table."""

from collections.abc import Callable

import msgspec

from dualpath.core.systems import BASELINE
from dualpath.lab.experiments.balance import WINDOW_S, Balance, attention_balance, snic_balance
from dualpath.lab.experiments.stages import mean_stages_s
from dualpath.results.cells import MeasuredPoint, cells, measured_points, place
from dualpath.results.file import ResultFile, Run
from dualpath.spec.topology import Topology

TIE_SHARE = 0.1
"""Job completion times within this share of each other tie."""
BINDS_RATIO = 1.1
"""Where pooling storage NICs could give this much, storage reads bind the job."""
LEAST_OF_IDEAL, LEAST_OF_BASIC = 0.9, 0.98
PAPER_ABLATION_PERCENT = {"basic-layerwise": -17.21, "dualpath-rr": -38.19, "dualpath": -45.62}
"""JCT against basic, DS 660B, MaxLen 64K (paper §10)."""
NIC_BOUND_SYSTEMS = ("basic", "dualpath")


class Pair(msgspec.Struct, frozen=True):
    """Two runs that read with equally many storage NICs."""

    first: str
    second: str
    nics: int
    jct_ratio: float
    """The first's over the second's."""

    @property
    def label(self) -> str:
        return f"{self.first}\nover {self.second}"

    @property
    def ties(self) -> bool:
        return abs(self.jct_ratio - 1) <= TIE_SHARE


def equal_bandwidth_pairs(result: ResultFile) -> list[Pair]:
    """Basic reads with P storage NICs, dualpath with P + D: every pair of cells with as many.

    Left out are points where the oracle says that storage does not bind: there, NICs do not decide.
    """
    found: list[tuple[str, int, float]] = []
    for point in measured_points(result):
        ideal = _oracle_bounded_ideal(point)
        if ideal is not None and ideal < BINDS_RATIO:
            continue
        size = Topology.parse(point.topology)
        for system in NIC_BOUND_SYSTEMS:
            run = point.complete(system)
            if run is not None:
                nics = size.prefill_nodes if system == BASELINE else size.prefill_nodes + size.decode_nodes
                found.append((f"{system} {point.topology}", nics, run.jct_s))
    return [
        Pair(first, second, nics, first_s / second_s)
        for index, (first, nics, first_s) in enumerate(found)
        for second, other_nics, second_s in found[index + 1 :]
        if nics == other_nics
    ]


def gains(result: ResultFile) -> list[str]:
    """Dualpath against basic on every point, and against the ideal."""
    sentences = []
    for point in measured_points(result):
        run = point.complete("dualpath")
        if run is None or run.ratio_to_basic is None or run.ideal_ratio is None or run.ratio_to_ideal is None:
            continue
        cell = point.cells["dualpath"]
        sentences.append(
            f"{place(point.topology, point.parameters)}: dualpath is {run.ratio_to_basic:.2f}× basic"
            f"{_range(len(cell.runs), [r.ratio_to_basic for r in cell.runs])}, {run.ratio_to_ideal:.0%} of the "
            f"{run.ideal_ratio:.2f}× that pooling could give at best."
        )
    return [*sentences, *soundness(result)]


def soundness(result: ResultFile) -> list[str]:
    """Turns lost, and whether all systems generated the same tokens."""
    failed = sum(run.errors for run in result.runs)
    compared = [run.same_tokens_as_basic for run in result.runs if run.same_tokens_as_basic is not None]
    sentences = [f"{failed} turns failed: runs that lost turns are compared with nothing."] if failed else []
    if compared and min(compared) == 1:
        sentences.append("Every system generated the same tokens in every turn.")
    elif compared:
        sentences.append(f"Generated tokens differ from basic's: in the worst run {min(compared):.1%} of turns agree.")
    return sentences


def pairs(result: ResultFile) -> list[str]:
    """Whether pairs of equal storage bandwidth tie; the agent that reads most; gains."""
    return [*ties(result), *gains(result)]


def ties(result: ResultFile) -> list[str]:
    """Pairs of equal storage bandwidth, and the agent that reads most."""
    return [*(_pair_sentence(pair) for pair in equal_bandwidth_pairs(result)), *longest_agent(result)]


def _pair_sentence(pair: Pair) -> str:
    verdict = "they tie" if pair.ties else f"no tie: more than {TIE_SHARE:.0%} apart"
    nics = "1 storage NIC" if pair.nics == 1 else f"{pair.nics} storage NICs"
    return f"{pair.first} and {pair.second}, both reading with {nics}: JCT ratio {pair.jct_ratio:.2f}; {verdict}."


def real_sessions(result: ResultFile) -> list[str]:
    """Where storage binds: does dualpath reach the ideal? Where it does not: does it lose nothing? And the pairs.

    Only the oracle, whose reads cost nothing, can tell.
    """
    return [*filter(None, map(_verdict, measured_points(result))), *ties(result), *soundness(result)]


def _oracle_bounded_ideal(point: MeasuredPoint) -> float | None:
    """Dualpath's ideal ratio to basic; None where there was no oracle to bound it."""
    run = point.complete("dualpath")
    return None if run is None or point.complete("oracle") is None else run.ideal_ratio


def longest_agent(result: ResultFile) -> list[str]:
    """What bounds every system that reads a request with one storage NIC: its turns follow one another."""
    run = next((run for run in result.runs if not run.errors and run.cluster is not None), None)
    rate = result.configuration.snic_bytes_per_s
    if run is None or run.cluster is None or rate is None:
        return []
    read_tokens: dict[str, int] = {}
    for turn in run.turn_results:
        read_tokens[turn.trajectory] = read_tokens.get(turn.trajectory, 0) + turn.loaded_tokens
    agent, most = max(read_tokens.items(), key=lambda item: item[1], default=("", 0))
    every = sum(read_tokens.values())
    if not most:
        return []
    per_token = run.cluster.kv_bytes_per_token
    sentence = (
        f"{agent} reads {most * per_token / 1e6:.0f} of {every * per_token / 1e6:.0f} MB, one turn after another: "
        f"{most * per_token / rate:.1f} s with one NIC, which no system that reads a request with one NIC can undercut."
    )
    return [sentence]


def _verdict(point: MeasuredPoint) -> str:
    run = point.complete("dualpath")
    if run is None or run.ratio_to_basic is None or run.ideal_ratio is None or run.ratio_to_ideal is None:
        return ""
    here = place(point.topology, point.parameters)
    if _oracle_bounded_ideal(point) is None:
        return f"{here}: dualpath is {run.ratio_to_basic:.2f}× basic; without an oracle nobody knows what could be had."
    if run.ideal_ratio >= BINDS_RATIO:
        held = "holds" if run.ratio_to_ideal >= LEAST_OF_IDEAL else "missed"
        return (
            f"{here}: storage binds (ideal {run.ideal_ratio:.2f}×); dualpath is {run.ratio_to_basic:.2f}× basic, "
            f"{run.ratio_to_ideal:.0%} of the ideal: at least {LEAST_OF_IDEAL:.0%} {held}."
        )
    held = "holds" if run.ratio_to_basic >= LEAST_OF_BASIC else "missed"
    return (
        f"{here}: storage does not bind (ideal {run.ideal_ratio:.2f}×); dualpath is {run.ratio_to_basic:.2f}× basic: "
        f"at least {LEAST_OF_BASIC:.2f}× {held}."
    )


def jct_change_percent(run: Run) -> float | None:
    """Against basic's median; negative is faster."""
    return None if run.ratio_to_basic is None else (1 / run.ratio_to_basic - 1) * 100


def ablation(result: ResultFile) -> list[str]:
    """Each system's change of JCT against basic, with the paper's."""
    sentences = []
    for cell in cells(result):
        change = cell.spread(jct_change_percent)
        paper = PAPER_ABLATION_PERCENT.get(cell.system)
        if change is not None and paper is not None:
            here = place(cell.topology, cell.parameters)
            sentences.append(
                f"{here}: {cell.system} changes basic's time by {change.median:+.1f} % (paper, DS 660B at 64K: "
                f"{paper:+.1f} %)."
            )
    return [*sentences, *soundness(result)]


def arrivals(result: ResultFile) -> list[str]:
    """TTFT of each system at each rate, and how its TPOT moved."""
    sentences = []
    for point in measured_points(result):
        told = [
            f"{system} {run.ttft_p50_s:.2f} s (p99 {run.ttft_p99_s:.2f})"
            for system in point.cells
            if (run := point.complete(system)) is not None and run.ttft_p50_s is not None and run.ttft_p99_s is not None
        ]
        sentences.append(f"{place(point.topology, point.parameters)}: median TTFT {', '.join(told)}.")
    return [*sentences, *soundness(result)]


def stages(result: ResultFile) -> list[str]:
    """The largest stage of every system's time to first token."""
    sentences = []
    for cell in cells(result):
        found = mean_stages_s(cell.runs)
        if found is not None:
            total_s = sum(found.values())
            largest = max(found, key=lambda stage: found[stage])
            sentences.append(
                f"{place(cell.topology, cell.parameters)}: {cell.system} takes {total_s:.2f} s to a first token on "
                f"average, {found[largest] / total_s:.0%} of it {largest}."
            )
    return [*sentences, *soundness(result)]


def snic(result: ResultFile) -> list[str]:
    """Storage NICs: max over average."""
    return _balances(result, snic_balance, "the busiest storage NIC receives")


def attention(result: ResultFile) -> list[str]:
    """Prefill attention: max over average."""
    return _balances(result, attention_balance, "the busiest PE has")


def _balances(result: ResultFile, measure: Callable[[Run], Balance | None], what: str) -> list[str]:
    sentences = []
    for cell in cells(result):
        found = [balance.overall for run in cell.runs if (balance := measure(run)) is not None]
        if found:
            middle = sorted(found)[len(found) // 2]
            sentences.append(
                f"{place(cell.topology, cell.parameters)}: under {cell.system} {what} {middle:.2f}× the average"
                f"{_range(len(found), found)} in a window of {WINDOW_S:g} s."
            )
    return [*sentences, *soundness(result)]


def _range(repeats: int, values: list[float | None] | list[float]) -> str:
    known = [value for value in values if value is not None]
    return "" if repeats < 2 or not known else f" ({min(known):.2f}–{max(known):.2f} over {repeats} runs)"
