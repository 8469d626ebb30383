"""Result file → a few plain sentences: what bound the baseline, what the best could be, where the rest went.

The busiest storage NIC can't finish before its bytes have passed at its rate, so a job's time splits into three::

    JCT = average bytes / rate          what a perfect balance needs
        + (max − average) / rate        imbalance between the NICs
        + the rest                      that NIC idle: compute, decode, scheduling, start and end of the job
"""

from dualpath.results.file import ResultFile, Run, representatives
from dualpath.spec.topology import Topology

BOUND_SHARE = 0.8
"""A NIC that is busy for this share of a job is called its bottleneck."""


def explain(result: ResultFile) -> list[str]:
    """Sentences in topology order, then what concerns all runs; none for a topology that lacks basic."""
    sentences: list[str] = []
    for topology in result.configuration.topologies:
        runs = {row.run.system: row.run for row in representatives(result) if row.run.topology == topology}
        complete = {system: run for system, run in runs.items() if not run.errors}
        basic, dualpath = complete.get("basic"), complete.get("dualpath")
        rate = result.configuration.snic_bytes_per_s
        if basic is not None and rate is not None:
            sentences.append(_bottleneck(topology, basic, rate))
        if dualpath is not None and dualpath.ratio_to_basic is not None:
            sentences.append(_gain(topology, dualpath, complete.get("oracle")))
            if rate is not None:
                sentences.append(_losses(topology, dualpath, rate))
    sentences += _agreement(result)
    failed = sum(run.errors for run in result.runs)
    if failed:
        sentences.append(f"{failed} turns failed: job completion times of the runs that lost turns are not comparable.")
    return sentences


def _agreement(result: ResultFile) -> list[str]:
    """Whether the systems generated the same tokens: none may trade a right answer for a fast one."""
    compared = [run for run in result.runs if run.same_tokens_as_basic is not None]
    differing = [run for run in compared if run.same_tokens_as_basic != 1]
    if compared and not differing:
        return ["Every system generated the same tokens in every turn."]
    return [
        f"{run.topology}: {run.system} generated basic's tokens in {run.same_tokens_as_basic:.1%} of its turns."
        for run in differing
    ]


def _busiest(run: Run) -> tuple[str, int]:
    return max(run.snic_bytes.items(), key=lambda item: item[1], default=("no engine", 0))


def _bottleneck(topology: str, basic: Run, rate: int) -> str:
    engine, n_bytes = _busiest(basic)
    busy_s = n_bytes / rate
    share = busy_s / basic.jct_s
    verdict = (
        "it is what bounds the job"
        if share >= BOUND_SHARE
        else f"less than {BOUND_SHARE:.0%}, so storage reads alone do not bound the job"
    )
    return (
        f"{topology}: under basic the SNIC of {engine} received {n_bytes / 1e9:.2f} GB, {busy_s:.1f} s at its rate and "
        f"{share:.0%} of the job's {basic.jct_s:.1f} s; {verdict}."
    )


def _gain(topology: str, dualpath: Run, oracle: Run | None) -> str:
    gained = f"{topology}: dualpath is {dualpath.ratio_to_basic:.2f}× basic"
    if dualpath.ideal_ratio is None or dualpath.ratio_to_ideal is None:
        return f"{gained}."
    by_nics = Topology.parse(topology).pooled
    reason = (
        "set by the number of storage NICs"
        if oracle is None or dualpath.ideal_ratio >= by_nics
        else f"set by compute: oracle, which pays nothing for I/O, takes {oracle.jct_s:.1f} s"
    )
    return (
        f"{gained}, {dualpath.ratio_to_ideal:.0%} of the most that pooling could give ({dualpath.ideal_ratio:.2f}×, "
        f"{reason})."
    )


def _losses(topology: str, dualpath: Run, rate: int) -> str:
    most = _busiest(dualpath)[1]
    average = sum(dualpath.snic_bytes.values()) / max(1, len(dualpath.snic_bytes))
    return (
        f"{topology}: of dualpath's {dualpath.jct_s:.1f} s, {average / rate:.1f} s are the reads spread evenly over "
        f"{len(dualpath.snic_bytes)} SNICs, {(most - average) / rate:.1f} s their imbalance (max/avg "
        f"{_ratio(dualpath.snic_max_over_avg)}), and in {max(0.0, dualpath.jct_s - most / rate):.1f} s the busiest "
        "SNIC waited for compute, decode or scheduling."
    )


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
