"""``dualpath testbed up|status|down|run|qos``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import add_system, byte_count, command, positive, positive_number, rate
from dualpath.cli.outcome import UsageError, command_errors, new_console, usage_errors, write_json

if TYPE_CHECKING:
    from dualpath.lab.testbed.plan import Plan

EXAMPLES = """\
Needs root. Each node gets a network namespace with a storage and a compute NIC, whose rates and two DSCP classes the
kernel keeps; a storage node runs a real object server. `dualpath experiment NAME --testbed` makes its own.

examples:
  dualpath testbed up 1P2D --snic-rate 30MB/s --cnic-rate 240MB/s
  dualpath testbed run --model .models/demo --store .store/bed                          serve until Ctrl-C
  dualpath testbed run --model .models/demo --store .store/bed -- sh -c 'curl $DUALPATH_URL/metrics'
  dualpath testbed status                                                               nodes, rates, bytes by class
  dualpath testbed down                                                                 also after a crash
  dualpath testbed qos                                                                  does KV delay messages?
"""


def add(commands: Any) -> None:
    parser = command(commands, "testbed", "emulate a cluster's networks on this host, in the kernel (root)", EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    example = "example:\n  dualpath testbed "
    _add_up(command(actions, "up", "build one", f"{example}up 1P2D --snic-rate 30MB/s --cnic-rate 240MB/s\n", _up))
    status = command(actions, "status", "show what is up", f"{example}status --json status.json\n", _status)
    command(actions, "down", "remove it and its processes", f"{example}down\n", _down)
    run = f"{example}run --model .models/demo --store .store/bed -- sh -c 'curl $DUALPATH_URL/health'\n"
    _add_run(command(actions, "run", "run a cluster in the testbed that is up", run, _run))
    delay = "measure whether KV delays high-class messages"
    qos = command(actions, "qos", delay, f"{example}qos --cnic-rate 125MB/s --rounds 5 --json qos.json\n", _qos)
    qos.add_argument("--transport", default="tcp", metavar="NAME", help="of channels (default: %(default)s)")
    qos.add_argument("--cnic-rate", type=rate, default="125MB/s", metavar="RATE", help="(default: %(default)s)")
    qos.add_argument(
        "--seconds", type=positive_number, default=2.0, metavar="S", help="of pings, and of all-to-alls (%(default)s)"
    )
    qos.add_argument("--rounds", type=positive, default=5, metavar="N", help="for medians (default: %(default)s)")
    for action in actions.choices.values():
        default = "qos" if action is qos else "bed"
        action.add_argument("--name", default=default, metavar="NAME", help="the testbed's (default: %(default)s)")
    for action in (status, qos):
        action.add_argument("--json", metavar="FILE", type=Path, help="write the report here too")


def _add_up(parser: Any) -> None:
    parser.add_argument("topology", nargs="?", default="1P2D", help="prefill and decode nodes (default: %(default)s)")
    parser.add_argument("--snic-rate", type=rate, metavar="RATE", help="rate of each storage NIC (default: unlimited)")
    parser.add_argument("--cnic-rate", type=rate, metavar="RATE", help="rate of each compute NIC (default: unlimited)")
    parser.add_argument("--storage-rate", type=rate, metavar="RATE", help="storage node's rate (default: unlimited)")
    parser.add_argument("--subnet", default="10.87", metavar="A.B", help="first half of all addresses (%(default)s)")
    parser.add_argument("--replace", action="store_true", help="first remove a testbed of that name")


def _add_run(parser: Any) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a Hugging Face checkpoint")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="what the object server serves")
    parser.add_argument("--topology", metavar="T", help="part of the testbed to use (default: all of it)")
    add_system(parser)
    parser.add_argument(
        "--buffer", type=byte_count, default="1GiB", metavar="SIZE", help="PE or DE buffer (%(default)s)"
    )
    parser.add_argument(
        "--hbm", type=byte_count, default="1GiB", metavar="SIZE", help="KV memory of a DE (%(default)s)"
    )
    parser.add_argument("--logs", type=Path, default=Path("results/logs/testbed"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("then", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="run it, with DUALPATH_URL set")


def _plan(arguments: argparse.Namespace, topology: str) -> "Plan":
    from dualpath.lab.testbed.plan import make_plan
    from dualpath.spec.topology import Topology

    with usage_errors(ValueError):
        size = Topology.parse(topology)
        return make_plan(arguments.name, size.prefill_nodes, size.decode_nodes, arguments.subnet)


def _up(arguments: argparse.Namespace) -> int:
    """Builds a testbed and leaves it up."""
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.network import status, up
    from dualpath.lab.testbed.plan import Rates
    from dualpath.lab.testbed.tables import status_table

    plan = _plan(arguments, arguments.topology)
    rates = Rates(arguments.snic_rate, arguments.cnic_rate, arguments.storage_rate)
    with command_errors(TestbedError):
        testbed = up(plan, rates, replace=arguments.replace)
        new_console().print(status_table(testbed, status(testbed)))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Shows the testbed that is up."""
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.iproute import check_tools
    from dualpath.lab.testbed.network import load, status
    from dualpath.lab.testbed.tables import status_table

    with command_errors(TestbedError):
        check_tools()
        testbed = load(arguments.name)
        nodes = status(testbed)
    write_json(arguments.json, {"testbed": testbed, "nodes": nodes})
    new_console().print(status_table(testbed, nodes))
    return 0


def _down(arguments: argparse.Namespace) -> int:
    """Removes a testbed, whatever is left of it."""
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.network import down
    from dualpath.lab.testbed.plan import check_name

    with usage_errors(ValueError):
        check_name(arguments.name)
    with command_errors(TestbedError):
        removed = down(arguments.name)
    print(f"removed: {', '.join(removed)}" if removed else f"nothing to remove: there is no testbed {arguments.name!r}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    """Runs a cluster in the testbed, until Ctrl-C or until a command ends."""
    if not (arguments.model / "config.json").is_file():
        raise UsageError(f"--model: {arguments.model} has no config.json; give a Hugging Face checkpoint's directory")
    from dualpath.lab.experiments.local_cluster import LaunchError
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.iproute import check_tools
    from dualpath.lab.testbed.network import load
    from dualpath.lab.testbed.serving import serve_inside

    then = arguments.then[1:] if arguments.then[:1] == ["--"] else arguments.then
    with command_errors(TestbedError, LaunchError, OSError):
        check_tools()
        testbed = load(arguments.name)
        plan = testbed.plan
        topology = arguments.topology or f"{plan.prefill_engines}P{plan.decode_engines}D"
        with usage_errors(ValueError):
            memory = ("--buffer", str(arguments.buffer), "--hbm", str(arguments.hbm))
            return serve_inside(
                testbed, arguments.model, arguments.store, topology, arguments.system, arguments.logs, then, memory
            )


def _qos(arguments: argparse.Namespace) -> int:
    """Measures. The exit code is 1 if the classes are not kept as wanted."""
    from dualpath.lab.testbed.failure import TestbedError
    from dualpath.lab.testbed.plan import check_name
    from dualpath.lab.testbed.qos import measure
    from dualpath.lab.testbed.tables import qos_lines, qos_table
    from dualpath.transfer import TRANSPORTS

    if arguments.cnic_rate is None:
        raise UsageError("--cnic-rate: give a rate; without one there is nothing to share")
    with usage_errors(ValueError, ImportError):
        check_name(arguments.name)
        TRANSPORTS.get(arguments.transport)
    console = new_console()
    with command_errors(TestbedError), console.status("") as shown:
        report = measure(
            arguments.transport,
            arguments.cnic_rate,
            arguments.seconds,
            arguments.rounds,
            lambda phase: shown.update(f"measuring: {phase}"),
            arguments.name,
        )
    write_json(arguments.json, report)
    console.print(qos_table(report))
    console.print(*qos_lines(report), sep="\n", highlight=False, soft_wrap=True)
    return 0 if report.is_as_wanted else 1
