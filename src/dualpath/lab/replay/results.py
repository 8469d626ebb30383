"""What a replay measured → a result file of kind ``replay``."""

import os
import platform
from collections.abc import Sequence

import msgspec

from dualpath.client.online import OnlineResult
from dualpath.lab.replay.settings import ReplaySettings
from dualpath.results.file import Configuration, ResultFile, Run, Workload
from dualpath.results.online import Capacity
from dualpath.results.turns import ReplayResult
from dualpath.traces.sources import Source
from dualpath.traces.trajectory import Trajectory, totals

TOPOLOGY = "served"
AGENTS = "agents"


def offline_result(settings: ReplaySettings, source: Source, replayed: ReplayResult) -> ResultFile:
    """Of agents that all started at once."""
    run = _run(settings, replayed, AGENTS)
    return _file(settings, source, [replayed], [run], {AGENTS: source.trajectories})


def online_result(
    settings: ReplaySettings,
    source: Source,
    measured: Sequence[OnlineResult],
    trajectories: Sequence[list[Trajectory]],
    capacity: Capacity | None = None,
) -> ResultFile:
    """Of one measurement, or of every probe of a search; `trajectories` are the agents that arrived in each."""
    runs, keys = [], [AGENTS if settings.find_agents_per_s is None else f"probe-{n}" for n in range(len(measured))]
    for number, (key, one) in enumerate(zip(keys, measured, strict=True)):
        parameters: dict[str, float | str] = {"agents_per_s": one.agents_per_s}
        runs.append(
            msgspec.structs.replace(
                _run(settings, one.replay, key),
                parameters=parameters | ({"probe": number} if settings.find_agents_per_s is not None else {}),
                agents_per_s=one.agents_per_s,
                windows=list(one.windows),
                verdict=one.verdict,
            )
        )
    agents = dict(zip(keys, trajectories, strict=True))
    found = _file(settings, source, [one.replay for one in measured], runs, agents)
    return msgspec.structs.replace(found, slo=settings.slo, capacity=capacity)


def _run(settings: ReplaySettings, replayed: ReplayResult, trajectories: str) -> Run:
    served = replayed.cluster
    return Run(
        trajectories=trajectories,
        turn_results=list(replayed.turns),
        failures=list(replayed.failures),
        cluster=None if served is None else served.setup,
        gap_scale=settings.options().gap_scale,
        context=replayed.context,
        parts=list(replayed.parts),
        start_pacing=replayed.start_pacing,
        pacing=replayed.pacing,
        topology=TOPOLOGY if served is None else served.topology,
        system=replayed.server if served is None else served.system,
        jct_s=replayed.jct_s,
        ratio_to_basic=None,
        ideal_ratio=None,
        ratio_to_ideal=None,
        snic_max_over_avg=None,
        snic_bytes={},
        **replayed.figures(),
    )


def _file(
    settings: ReplaySettings,
    source: Source,
    replayed: Sequence[ReplayResult],
    runs: list[Run],
    trajectories: dict[str, list[Trajectory]],
) -> ResultFile:
    every = totals(agent for agents in trajectories.values() for agent in agents)
    setup = runs[0].cluster
    return ResultFile(
        kind="replay",
        name="replay",
        trajectories=trajectories,
        runs=runs,
        configuration=Configuration(
            model=replayed[0].model,
            topologies=[runs[0].topology],
            systems=[runs[0].system],
            snic_bytes_per_s=None if setup is None else setup.snic_bytes_per_s,
            cnic_bytes_per_s=None if setup is None else setup.cnic_bytes_per_s,
            repeats=1,
            seed=settings.seed,
            machine=f"client: {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}, "
            f"Python {platform.python_version()}",
        ),
        command=settings.command,
        workload=Workload(
            source=source.description,
            agents=sum(len(agents) for agents in trajectories.values()),
            turns=every.rounds,
            prompt_tokens=every.prompt_tokens,
            append_tokens=every.append_tokens,
            generate_tokens=every.generate_tokens,
            max_context_tokens=every.max_context_tokens,
            warm_up="no warm-up",
        ),
    )
