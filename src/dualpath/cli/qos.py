"""``dualpath qos render|check``."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpath.cli.arguments import command, rate, weights
from dualpath.cli.outcome import CommandError, UsageError, command_errors, usage_errors, write_json
from dualpath.core.traffic_classes import WEIGHTS

if TYPE_CHECKING:
    from dualpath.lab.fabric.findings import CheckReport

OPTIONS = {
    "infiniband": ("storage_guid", "opensm_conf"),
    "roce": ("device",),
    "linux": ("device", "rate"),
}
"""Those that are of some fabrics alone, by fabric."""
EXAMPLES = """\
Two classes share every NIC, 99 : 1: model execution's messages, and KV. `render` writes what makes a fabric keep them
apart, `check` reads the fabric back and says what differs and what follows. docs/how-to/fabric.md has the whole way.

examples:
  dualpath qos render --fabric infiniband --out qos      OpenSM's options and policy, service levels for UCX and NCCL
  dualpath qos check --fabric infiniband --opensm-conf /etc/opensm/opensm.conf
  dualpath qos render --fabric roce --device eth2        dcb and mlnx_qos commands for one NIC
  dualpath qos check --fabric linux --device eth0        exit code 0: as meant, 1: it differs, 2: it can't be read
"""
RENDER = """\
examples:
  dualpath qos render --fabric infiniband --storage-guid 0x98039b0300a1b2c3 --out qos
  dualpath qos render --fabric roce --device eth2 --out qos && sh qos/dcb-eth2.sh
  dualpath qos render --fabric linux --device eth0 --rate 12.5GB/s | tc -batch -
"""
CHECK = """\
Nothing is changed. InfiniBand: every linked port, from any host of the fabric, as root. RoCE and Linux: this host's
device, in this network namespace. Exit code 0: no difference, 1: differences, 2: it can't be read, or
not be written to --json's FILE.

examples:
  dualpath qos check --fabric infiniband --opensm-conf /etc/opensm/opensm.conf --json qos.json
  dualpath qos check --fabric roce --device eth2
  ip netns exec dualpath-bed-pe0 dualpath qos check --fabric linux --device cnic0 --rate 240MB/s
"""


def add(commands: Any) -> None:
    parser = command(commands, "qos", "write a fabric's settings for the two traffic classes, or check them", EXAMPLES)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    render = command(actions, "render", "write what an operator installs", RENDER, _render)
    check = command(actions, "check", "read a fabric back and say what differs, and what follows", CHECK, _check)
    for action in (render, check):
        action.add_argument("--fabric", choices=OPTIONS, required=True, help="what connects the nodes")
        action.add_argument("--device", metavar="DEV", help="the NIC (roce, linux)")
        action.add_argument("--rate", type=rate, metavar="RATE", help="of the link, in each direction (linux)")
        action.add_argument(
            "--weights",
            type=weights,
            default=WEIGHTS,
            metavar="HIGH:LOW",
            help="(default: the traffic manager's, 99:1)",
        )
    guid = "a port that all paths to carry KV: a storage node's (infiniband; may be repeated)"
    render.add_argument("--storage-guid", action="append", default=[], metavar="GUID", help=guid)
    render.add_argument("--out", type=_folder, metavar="DIR", help="write files here instead of printing them")
    check.add_argument(
        "--opensm-conf", type=Path, metavar="FILE", help="compare OpenSM's options and policy too (infiniband)"
    )
    check.add_argument("--json", metavar="FILE", type=Path, help="write the report here too")


def _render(arguments: argparse.Namespace) -> int:
    """Prints or writes files."""
    from dualpath.lab.fabric import infiniband, roce

    _refuse_foreign_options(arguments)
    files = _files(arguments)
    notes = {"infiniband": infiniband.notes, "roce": roce.notes}.get(arguments.fabric, lambda _: ())
    for note in notes(arguments.weights):
        print(f"dualpath qos: --weights {note}", file=sys.stderr)
    if arguments.out is None:
        for name, text in files.items():
            print(*([f"# {name}"] if len(files) > 1 else []), text, sep="\n", end="")
        return 0
    with command_errors(OSError):
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (arguments.out / name).write_text(text)
            print(arguments.out / name)
    return 0


def _files(arguments: argparse.Namespace) -> dict[str, str]:
    from dualpath.lab.fabric import htb, infiniband, roce
    from dualpath.lab.fabric.findings import FabricError

    if arguments.fabric == "infiniband":
        with usage_errors(FabricError):
            return infiniband.render(arguments.weights, arguments.storage_guid)
    device = _device(arguments)
    if arguments.fabric == "roce":
        return roce.render(device, arguments.weights)
    if arguments.rate is None:
        raise UsageError(
            "--rate: give the link's rate; HTB keeps its classes apart at no other place than its own limit"
        )
    return {f"htb-{device}.tc": "\n".join(htb.shaping(device, arguments.rate, "classes", arguments.weights)) + "\n"}


def _check(arguments: argparse.Namespace) -> int:
    """Prints what differs. The exit code is 1 if something does, and 2 if it can't be read, or not be written down."""
    from dualpath.lab.fabric.findings import FabricError, lines

    _refuse_foreign_options(arguments)
    try:
        report = _report(arguments)
    except FabricError as error:
        print(f"dualpath qos: can't check: {error}", file=sys.stderr)
        return 2
    print(*lines(report), sep="\n", flush=True)
    try:
        write_json(arguments.json, report)
    except CommandError as error:
        print(f"dualpath qos: can't write the report: {error}", file=sys.stderr)
        return 2
    return 0 if report.is_as_meant else 1


def _report(arguments: argparse.Namespace) -> "CheckReport":
    from dualpath.lab.fabric.reading import check_infiniband, check_linux, check_roce

    if arguments.fabric == "infiniband":
        return check_infiniband(arguments.opensm_conf, arguments.weights)
    device = _device(arguments)
    if arguments.fabric == "roce":
        return check_roce(device, arguments.weights)
    return check_linux(device, arguments.rate, arguments.weights)


def _refuse_foreign_options(arguments: argparse.Namespace) -> None:
    own = OPTIONS[arguments.fabric]
    for name in sorted({name for names in OPTIONS.values() for name in names}.difference(own)):
        if getattr(arguments, name, None):
            raise UsageError(f"--{name.replace('_', '-')}: not of --fabric {arguments.fabric}")


def _device(arguments: argparse.Namespace) -> str:
    if re.fullmatch(r"(?!-|\.\.?$)[\w.@-]{1,15}", arguments.device or "") is None:
        raise UsageError(f"--device: name the NIC, as `ip link` does; --fabric {arguments.fabric} is of one")
    return str(arguments.device)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("name a folder; . is this one")
    return Path(text)
