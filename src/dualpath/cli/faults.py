"""``dualpath faults table|sim|replay|real``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import command, not_negative, positive, positive_number, topology
from dualpath.cli.outcome import CommandError, command_errors, new_console, usage_errors, write_json
from dualpath.spec.cluster_setup import ENGINES

if TYPE_CHECKING:
    from dualpath.lab.faults.matrix import Combination
    from dualpath.lab.faults.real.trial import Bench
    from dualpath.lab.faults.sim.episodes import Report

EXAMPLES = """\
One table says which faults (kill, stop, slow, partition, full, corrupt, wrong, late, hung), victims, read paths and
phases of a request go together. `sim` hurts core's scheduler in seeded random steps, `real` a running `dualpath serve`.

examples:
  dualpath faults table                                          every combination, and why the others make no sense
  dualpath faults sim --steps 1000000 --seed 7
  dualpath faults replay faults.jsonl                            what `sim` found, step by step
  dualpath faults real --only fault=kill,victim=DE --json kills.json
  dualpath faults real --minutes 60 --topology 1P2D --seed 7     one cluster, mixed load, a fault every few seconds
"""


def add(commands: Any) -> None:
    parser = command(commands, "faults", "break a cluster in every way, and see that it holds", EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    example = "example:\n  dualpath faults "
    table = command(actions, "table", "list the combinations", f"{example}table --only victim=store\n", _table)
    sim = command(actions, "sim", "random steps on core's scheduler", f"{example}sim --steps 1000000 --seed 7\n", _sim)
    sim.add_argument("--steps", type=positive, default=100_000, metavar="N", help="(default: %(default)s)")
    sim.add_argument("--seed", type=not_negative, default=0, metavar="N", help="(default: %(default)s)")
    sim.add_argument("--audit-every", type=positive, default=1, metavar="N", help="steps (default: %(default)s)")
    found = "where to write the steps of a failure (default: %(default)s)"
    sim.add_argument("--found", type=Path, default=Path("faults.jsonl"), metavar="FILE", help=found)
    replay = command(actions, "replay", "run a failure's steps again", f"{example}replay faults.jsonl\n", _replay)
    replay.add_argument("file", type=Path, metavar="FILE", help="written by `dualpath faults sim`")
    _add_real(command(actions, "real", "on the processes of a cluster", f"{example}real --only victim=DE\n", _real))
    for action in (table, sim, actions.choices["real"]):
        action.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    for action in (table, actions.choices["real"]):
        action.add_argument("--only", default="", metavar="WHAT", help="such as fault=kill,victim=DE,phase=decoding")


def _add_real(parser: Any) -> None:
    parser.add_argument("--topology", type=topology, default="1P1D", metavar="T", help="(default: %(default)s)")
    what = "what computes (default: %(default)s)"
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help=what)
    parser.add_argument("--hold", type=positive_number, default=8.0, metavar="S", help="faults last (%(default)g s)")
    parser.add_argument("--sample", type=positive, metavar="N", help="only N of the combinations, drawn with --seed")
    parser.add_argument("--seed", type=not_negative, default=0, metavar="N", help="(default: %(default)s)")
    soak = "soak one cluster instead: mixed load, and a fault every few seconds"
    parser.add_argument("--minutes", type=positive, metavar="N", help=soak)
    parser.add_argument("serve_options", nargs="*", metavar="-- OPTION", help="more options for `dualpath serve`")


def _table(arguments: argparse.Namespace) -> int:
    """Prints the table."""
    from dualpath.lab.faults.matrix import select
    from dualpath.lab.faults.tables import cells, matrix_table

    with usage_errors(ValueError):
        wanted = select(arguments.only)
    found = cells(wanted)
    write_json(arguments.json, found)
    new_console().print(matrix_table(found))
    return 0


def _sim(arguments: argparse.Namespace) -> int:
    """Runs random steps. The exit code is 1 if one broke something."""
    from dualpath.lab.faults.sim import episodes
    from dualpath.lab.faults.tables import sim_table

    report = episodes.run(
        arguments.steps, arguments.seed, audit_every=arguments.audit_every, on_progress=_show_progress
    )
    write_json(arguments.json, report)
    if report.failure is not None:
        with command_errors(OSError):
            episodes.write(report.failure, arguments.found)
        raise CommandError(
            f"after {report.steps} steps: {report.failure.failure}\n"
            f"{len(report.failure.steps)} steps lead there: dualpath faults replay {arguments.found}"
        )
    new_console().print(sim_table(report))
    return 0


def _show_progress(report: "Report") -> None:
    rate = report.steps / report.seconds
    _to_stderr(f"{report.steps:,} steps in {report.seconds:,.0f} s, {rate:,.0f} a second")


def _replay(arguments: argparse.Namespace) -> int:
    """Runs the steps of a file. The exit code is 1 if they break something."""
    from dualpath.lab.faults.sim import episodes

    with usage_errors(ValueError), command_errors(OSError):
        script = episodes.read(arguments.file)
    print(f"{script.setting}\nit ended in: {script.failure or 'nothing'}")
    with command_errors(episodes.Failed):
        episodes.replay(script, print)
    print("nothing breaks")
    return 0


def _real(arguments: argparse.Namespace) -> int:
    """Hurts real clusters. The exit code is 1 if a combination failed."""
    import signal
    import tempfile

    from dualpath.lab.faults.matrix import combinations, sample, select, selected
    from dualpath.lab.faults.real.served import StartError
    from dualpath.lab.faults.real.trial import Bench, run
    from dualpath.lab.faults.tables import trial_line, trials_table

    with usage_errors(ValueError):
        wanted = select(arguments.only)
    chosen = [at for at in combinations("real") if selected(at, wanted)]
    if arguments.sample is not None:
        chosen = sample(chosen, arguments.sample, arguments.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clusters end with it
    with tempfile.TemporaryDirectory(prefix="dualpath-faults-") as work, command_errors(StartError, OSError):
        bench = Bench(Path(work), str(arguments.topology), arguments.hold, arguments.serve_options, arguments.engine)
        if arguments.minutes is not None:
            return _soak(arguments, bench, chosen)
        trials = run(bench, chosen, lambda trial: print(trial_line(trial), flush=True))
    write_json(arguments.json, trials)
    new_console().print(trials_table(trials))
    return 1 if any(trial.outcome == "FAILED" for trial in trials) else 0


def _soak(arguments: argparse.Namespace, bench: "Bench", chosen: "list[Combination]") -> int:
    """Soaks a cluster. The exit code is 1 if an answer was wrong, something was not served again, or has grown."""
    from dualpath.lab.faults.real import soak

    with usage_errors(ValueError):
        done = soak.run(bench, chosen, arguments.minutes, arguments.seed, _to_stderr)
    write_json(arguments.json, done)
    for what, counts in (("faults", done.faults), ("answers", done.verdicts)):
        print(f"{what}: {', '.join(f'{n:,} {name}' for name, n in counts.most_common())}")
    print("\n".join(done.found) or "nothing wrong, nothing has grown")
    return 1 if done.found else 0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
