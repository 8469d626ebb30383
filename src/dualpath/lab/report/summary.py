"""Explains a result in a few sentences: what bound the baseline, what the ideal is, where the rest went.

The busiest storage NIC can't finish before its bytes have passed at its rate, so a job's time has three parts::

    JCT = average bytes / rate          what a perfect balance needs
        + (max − average) / rate        imbalance between the NICs
        + the rest                      that NIC idle: compute, decode, scheduling, start and end of the job
"""

from collections.abc import Callable, Iterable, Iterator

from dualpath.core.systems import BASELINE
from dualpath.lab.report.chain import longest_chain
from dualpath.results.build import pooled
from dualpath.results.cells import Cell, Comparison, cells_of, comparisons
from dualpath.results.file import ResultFile, Run
from dualpath.results.roles import contenders, oracle_among, readers

PAUSE_S = 0.05
"""Shorter pauses of an agent are the client's own, and not worth a word."""
BOUND_SHARE = 0.8
"""Share of a job from which a busy NIC is called its bottleneck."""


def explain(result: ResultFile) -> list[str]:
    """Returns sentences in topology order, then those about all runs; none for a topology without the baseline."""
    rate = result.configuration.snic_rate
    sentences = [sentence for one in comparisons(cells_of(result)) for sentence in _comparison(one, rate)]
    return [*sentences, *soundness(result)]


def soundness(result: ResultFile) -> list[str]:
    """Says whether all systems generated the same tokens (a fast wrong answer is worth nothing), and failed turns."""
    agreed = [(cell, same) for cell in cells_of(result) if (same := cell.spread(lambda run: run.same_tokens_as_basic))]
    sentences = [
        f"{cell.setting.label}: {cell.system} generated {BASELINE}'s tokens in {same.least:.1%} of its turns."
        for cell, same in agreed
        if same.least < 1
    ]
    if agreed and not sentences:
        sentences = ["Every system generated the same tokens in every turn."]
    failed = sum(run.errors for run in result.runs)
    if failed:
        sentences.append(f"{failed} turns failed: job completion times of the runs that lost turns are not comparable.")
    return sentences


def gains(result: ResultFile) -> list[str]:
    """Compares every contender with the baseline and with the ideal, under every setting."""
    return [_gain(one, cell) for one, cell in _gaining(comparisons(cells_of(result)))] + soundness(result)


def _gaining(found: Iterable[Comparison]) -> Iterator[tuple[Comparison, Cell]]:
    """Yields the contenders whose times are comparable: all turns answered, all agents started at once."""
    for one in found:
        for system in contenders(one.cells):
            run = one.complete(system)
            if run is not None and run.ratio_to_basic is not None and run.agents_per_s is None:
                yield one, one.cells[system]


def _comparison(one: Comparison, rate: int | None) -> list[str]:
    basic = one.complete(BASELINE)
    sentences = [] if basic is None or rate is None else [_bottleneck(one.setting.label, basic, rate)]
    for _, cell in _gaining([one]):
        sentences.append(_gain(one, cell))
        if rate is not None:
            sentences += [
                _losses(one.setting.label, cell.median, rate),
                *_last_agent(one.setting.label, cell.median, rate),
            ]
    return sentences


def _last_agent(where: str, run: Run, rate: int) -> list[str]:
    chain = longest_chain(run, rate)
    if chain is None:
        return []
    pauses = f", {chain.pauses_s:.1f} s pauses" if chain.pauses_s >= PAUSE_S else ""
    told = (
        f"{where}: {run.system} can't end before its longest chain of one agent ({chain.trajectory}), "
        f"{chain.total_s:.1f} s: {chain.decode_s:.1f} s decode, {chain.prefill_s:.1f} s prefill, "
        f"{chain.reads_alone_s:.1f} s reads with every SNIC to itself ({chain.reads_s:.1f} s as they were){pauses}."
    )
    return [told]


def _busiest(run: Run) -> tuple[str, int]:
    return max(run.snic_bytes.items(), key=lambda item: item[1], default=("no engine", 0))


def _bottleneck(where: str, basic: Run, rate: int) -> str:
    engine, n_bytes = _busiest(basic)
    busy_s = n_bytes / rate
    share = busy_s / basic.jct_s
    verdict = (
        "it is what bounds the job"
        if share >= BOUND_SHARE
        else f"less than {BOUND_SHARE:.0%}, so storage reads alone do not bound the job"
    )
    return (
        f"{where}: under {basic.system} the SNIC of {engine} received {n_bytes / 1e9:.2f} GB, {busy_s:.1f} s at its "
        f"rate and {share:.0%} of the job's {basic.jct_s:.1f} s; {verdict}."
    )


def _gain(one: Comparison, cell: Cell) -> str:
    run, oracle = cell.median, one.complete(oracle_among(one.cells))
    ratio = f"{run.ratio_to_basic:.2f}× {BASELINE}{range_text(cell, lambda repeat: repeat.ratio_to_basic)}"
    gained = f"{one.setting.label}: {run.system} is {ratio}"
    if run.ideal_ratio is None or run.ratio_to_ideal is None:
        return f"{gained}."
    reason = (
        "set by the number of storage NICs"
        if oracle is None or run.ideal_ratio >= pooled(run)
        else f"set by compute: {oracle.system}, which pays nothing for I/O, takes {oracle.jct_s:.1f} s"
    )
    return f"{gained}, {run.ratio_to_ideal:.0%} of the most that pooling could give ({run.ideal_ratio:.2f}×, {reason})."


def range_text(cell: Cell, figure: Callable[[Run], float | None]) -> str:
    """Returns `` (1.81–1.93 over 3 runs)``, or nothing for a single run."""
    found = cell.spread(figure)
    if found is None or len(cell.counted) < 2:
        return ""
    return f" ({found.least:.2f}–{found.most:.2f} over {len(cell.counted)} runs)"


def _losses(where: str, run: Run, rate: int) -> str:
    received = {engine: run.snic_bytes[engine] for engine in readers(run.system, list(run.snic_bytes))}
    most, average = _busiest(run)[1], sum(received.values()) / max(1, len(received))
    balance = "–" if run.snic_max_over_avg is None else f"{run.snic_max_over_avg:.2f}"
    return (
        f"{where}: of {run.system}'s {run.jct_s:.1f} s, {average / rate:.1f} s are the reads spread evenly over "
        f"{len(received)} SNICs, {(most - average) / rate:.1f} s their imbalance (max/avg {balance}), and in "
        f"{max(0.0, run.jct_s - most / rate):.1f} s the busiest SNIC waited for compute, decode or scheduling."
    )
