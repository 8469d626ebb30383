"""How well `dualpath simulate --like` predicts this machine: calibrate, run real clusters, predict them, compare.

    python benchmarks/prediction.py [--machine machine.json] [--only NAME …] [--out DIR] [--json FILE]

Nothing is tuned on the runs: the calibration comes first and knows none of them. They differ in topology, system, rates
and in how much agents append and generate; some are bound by storage, some by the cores. The goal is 10 % of each job
completion time and 15 % of each mean time to first token. Leave the machine alone meanwhile: about ten minutes.
"""

import argparse
from pathlib import Path

import msgspec
from rich.console import Console

from dualpath.calibration import CalibrationOptions, calibrate, machine_tables
from dualpath.experiment.agents import generated_agents
from dualpath.experiment.plan import Plan, Point, runs_of
from dualpath.experiment.run import run_plan
from dualpath.experiment.settings import Settings
from dualpath.prediction import comparison_table, load_machine, predict
from dualpath.prediction.table import mean_ttft_s
from dualpath.report.result_file import ResultFile
from dualpath.workload import AgentMix

SYSTEMS = ("basic", "dualpath", "oracle")


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Runs that share rates and agents."""

    topologies: tuple[str, ...]
    snic_bytes_per_s: int
    cnic_bytes_per_s: int
    mix: AgentMix
    agents: int
    systems: tuple[str, ...] = SYSTEMS


CONFIGURATIONS = {
    "reads": Configuration(
        topologies=("1P1D", "1P2D"),
        snic_bytes_per_s=40_000_000,
        cnic_bytes_per_s=320_000_000,
        mix=AgentMix(turns=4, first_context_tokens=2400, append_tokens=64, generate_tokens=16),
        agents=8,
    ),
    "answers": Configuration(
        topologies=("2P1D",),
        snic_bytes_per_s=80_000_000,
        cnic_bytes_per_s=480_000_000,
        mix=AgentMix(turns=4, first_context_tokens=1500, append_tokens=48, generate_tokens=60),
        agents=6,
    ),
    "appends": Configuration(
        topologies=("1P1D",),
        snic_bytes_per_s=25_000_000,
        cnic_bytes_per_s=250_000_000,
        mix=AgentMix(turns=4, first_context_tokens=1200, append_tokens=300, generate_tokens=24),
        agents=6,
        systems=("basic-layerwise", "dualpath-rr", "dualpath", "oracle"),
    ),
}


class RunError(msgspec.Struct, frozen=True, kw_only=True):
    """One run: measured and predicted seconds, and relative errors."""

    configuration: str
    topology: str
    system: str
    jct_s: float
    predicted_jct_s: float
    ttft_s: float
    predicted_ttft_s: float

    @property
    def jct_error(self) -> float:
        return self.predicted_jct_s / self.jct_s - 1

    @property
    def ttft_error(self) -> float:
        return self.predicted_ttft_s / self.ttft_s - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, help="of an earlier calibration (default: calibrate)")
    parser.add_argument("--model", type=Path, default=Path(".models/demo"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("results/prediction"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.machine is None:
        rates = calibrate(CalibrationOptions(model=arguments.model), lambda what: console.print(f"measuring {what}"))
        (arguments.out / "machine.json").write_bytes(msgspec.json.encode(rates))
    else:
        rates = load_machine(arguments.machine)
    console.print(machine_tables(rates))
    errors: list[RunError] = []
    for name in arguments.only:
        measured = run(name, CONFIGURATIONS[name], arguments.model, arguments.out, console)
        predicted = predict(measured, rates)
        console.print(comparison_table(measured, predicted, rates))
        errors += compare(name, measured, predicted)
    worst = max(abs(error.jct_error) for error in errors), max(abs(error.ttft_error) for error in errors)
    console.print(f"worst of {len(errors)} runs: JCT {worst[0]:.1%}, mean TTFT {worst[1]:.1%}")
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.encode(errors))


def run(name: str, configuration: Configuration, model: Path, out: Path, console: Console) -> ResultFile:
    """Measure it on real clusters."""
    agents = generated_agents(configuration.mix, configuration.agents, seed=7)
    points = [
        Point(topology=topology, systems=configuration.systems, agents="agents")
        for topology in configuration.topologies
    ]
    plan = Plan(
        name=name, trajectories={"agents": agents}, runs=runs_of(points, repeats=1), source="benchmarks/prediction.py"
    )
    settings = Settings(
        snic_bytes_per_s=configuration.snic_bytes_per_s,
        cnic_bytes_per_s=configuration.cnic_bytes_per_s,
        model=model,
        out=out,
    )
    return run_plan(plan, settings, console)


def compare(name: str, measured: ResultFile, predicted: ResultFile) -> list[RunError]:
    """Run by run."""
    return [
        RunError(
            configuration=name,
            topology=one.topology,
            system=one.system,
            jct_s=one.jct_s,
            predicted_jct_s=other.jct_s,
            ttft_s=mean_ttft_s(one) or 0.0,
            predicted_ttft_s=mean_ttft_s(other) or 0.0,
        )
        for one, other in zip(measured.runs, predicted.runs, strict=True)
    ]


if __name__ == "__main__":
    main()
