"""From a measured result file to a predicted one: every run simulated from its setup and its agents, and nothing else.

A prediction has the runs of the measurement in their order and with their parameters. What it says of a run comes from
`setup_of` and the machine alone; the measured times are not looked at (a test scrambles them).
"""

import statistics

import msgspec

from dualpath.core.vocabulary import BLOCK_TOKENS, Side
from dualpath.experiment.assemble import ideal_ratio, snic_max_over_avg
from dualpath.prediction.agents import Replay
from dualpath.prediction.cluster import Cluster, PredictionError
from dualpath.prediction.machine import MachineRates
from dualpath.prediction.setup import RunSetup, setup_of
from dualpath.prediction.turns import Turn
from dualpath.report.result_file import ResultFile, Run
from dualpath.spec.timings import Timings
from dualpath.workload.result import ReplayResult, TurnResult


def predict(measured: ResultFile, rates: MachineRates, command: str = "", as_calibrated: bool = False) -> ResultFile:
    """The same runs on the machine `rates`, each as fast as it was meanwhile, or `as_calibrated`.

    Raises MachineError where a run does not say enough or the machine is another, PredictionError where a run would
    fail.
    """
    setups = [setup_of(measured, number, rates, as_calibrated) for number in range(len(measured.runs))]
    predicted = [_predict_run(run, setup) for run, setup in zip(measured.runs, setups, strict=True)]
    return ResultFile(
        kind="prediction",
        name=measured.name,
        trajectories=measured.trajectories,
        runs=[_with_ratios(run, predicted) for run in predicted],
        configuration=msgspec.structs.replace(measured.configuration, machine=rates.description),
        command=command,
        workload=measured.workload,
    )


def simulate(setup: RunSetup) -> tuple[Cluster, list[Turn], int]:
    """Run all agents of `setup` to their ends: the cluster, the turns as they ended, and the time of the last end."""
    cluster = Cluster(setup)
    replay = Replay(cluster, setup)
    ended = replay.start()
    while not ended.is_set:
        if not len(cluster.events):
            raise PredictionError(f"after {len(replay.turns)} turns nothing moves any more; core waits for something")
        cluster.events.step()
    return cluster, replay.turns, cluster.events.now


def _predict_run(run: Run, setup: RunSetup) -> Run:
    cluster, turns, jct_ns = simulate(setup)
    names = [f"PE{rank}" for rank in range(setup.prefill_engines)]
    names += [f"DE{rank}" for rank in range(setup.decode_engines)]
    results = tuple(_turn_result(turn, names) for turn in turns)
    snic_bytes = {name: nic.rx.moved_bytes for name, nic in zip(names, cluster.snics, strict=True)}
    return Run(
        parameters=run.parameters,
        trajectories=run.trajectories,
        first_round=run.first_round,
        gap_scale=run.gap_scale,
        agents_per_s=run.agents_per_s,
        cluster=run.cluster,
        reference_ns=setup.slowness * setup.rates.reference_ns,
        turn_results=list(results),
        topology=run.topology,
        system=run.system,
        repeat=run.repeat,
        jct_s=jct_ns / 1e9,
        ratio_to_basic=None,
        ideal_ratio=None,
        ratio_to_ideal=None,
        snic_max_over_avg=snic_max_over_avg(setup.system, snic_bytes),
        snic_bytes=snic_bytes,
        **ReplayResult(jct_s=jct_ns / 1e9, turns=results, failures=()).figures(),
    )


def _turn_result(turn: Turn, names: list[str]) -> TurnResult:
    later_tokens = turn.generate_tokens - 1
    return TurnResult(
        trajectory=turn.trajectory,
        round_index=turn.round_index,
        tries=1,
        start_s=turn.sent_ns / 1e9,
        ttft_s=(turn.first_token_ns - turn.sent_ns) / 1e9,
        ttst_s=(turn.second_token_ns - turn.first_token_ns) / 1e9 if later_tokens else None,
        tpot_s=(turn.last_token_ns - turn.first_token_ns) / 1e9 / later_tokens if later_tokens else None,
        latency_s=(turn.last_token_ns - turn.sent_ns) / 1e9,
        prompt_tokens=turn.prompt_tokens,
        loaded_tokens=turn.hit_tokens,
        generated_tokens=turn.generate_tokens,
        output_digest="",
        timings=_timings(turn, names),
    )


def _timings(turn: Turn, names: list[str]) -> Timings:
    read = dict.fromkeys(Side, 0)
    for leg in turn.legs:
        read[leg.side] += leg.blocks * BLOCK_TOKENS
    return Timings(
        scheduling_s=(turn.placed_ns - turn.arrived_ns) / 1e9,
        allocation_s=(turn.allocated_ns - turn.placed_ns) / 1e9,
        read_s=(turn.read_ns - turn.allocated_ns) / 1e9,
        prefill_s=(turn.first_out_ns - turn.read_ns) / 1e9,
        decode_s=(turn.last_out_ns - turn.first_out_ns) / 1e9,
        prefill_engine=names[turn.prefill_engine],
        decode_engine=names[turn.decode_engine],
        pe_read_tokens=read[Side.PE],
        de_read_tokens=read[Side.DE],
        attempts=1,
    )


def _with_ratios(run: Run, runs: list[Run]) -> Run:
    """Set against basic and oracle of the same topology and parameters, as a measured run is."""

    def median_s(system: str) -> float | None:
        place = (run.topology, run.parameters, system)
        times_s = [other.jct_s for other in runs if (other.topology, other.parameters, other.system) == place]
        return statistics.median_low(times_s) if times_s else None

    basic_s = median_s("basic")
    if basic_s is None:
        return run
    ratio, ideal = basic_s / run.jct_s, ideal_ratio(run.topology, basic_s, median_s("oracle"))
    described = run.system not in ("basic", "oracle")
    return msgspec.structs.replace(
        run, ratio_to_basic=ratio, ideal_ratio=ideal, ratio_to_ideal=ratio / ideal if described else None
    )
