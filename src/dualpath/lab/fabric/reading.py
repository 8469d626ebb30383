"""Reads a fabric back with its own tools: `ibnetdiscover` and `smpquery`, `dcb`, `tc`; then checks it.

Nothing is changed. Every function raises FabricError if a tool is missing, refuses, or says what can't be understood.
"""

import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import msgspec

from dualpath.core.traffic_classes import WEIGHTS
from dualpath.lab.fabric import htb, infiniband, roce
from dualpath.lab.fabric.findings import CheckReport, FabricError, Weights
from dualpath.lab.fabric.infiniband import Port, PortTables, Table

Kind = TypeVar("Kind")
TIMEOUT_S = 60.0
"""Of one run of a tool."""
FABRIC_TIMEOUT_S = 900.0
"""Of all of an InfiniBand fabric: ports that were not asked by then differ."""
MAX_BYTES = 16 * 1024 * 1024
"""Of what a tool prints, or a file holds."""
MAX_SAID = 400
"""Characters of a tool's own words that are shown."""
PACKAGES = {"ibnetdiscover": "infiniband-diags", "smpquery": "infiniband-diags", "dcb": "iproute2", "tc": "iproute2"}
SIMULATOR_VARIABLE = "SIM_HOST"
"""Set by who speaks to ibsim, which answers for a port's high limit always with 0."""
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_HINTS = (
    ("ermission denied", "run it as root"),
    ("not permitted", "run it as root"),
    ("UMAD", "this host has no InfiniBand device, or lacks the module ib_umad, or wants root; run it on one that has"),
    ("Operation not supported", "the driver of this device takes no DCB settings"),
    ("No such device", "name one that this host has"),
    ("Cannot find device", "name one that this host has"),
)
_LINK = re.compile(r"^(?:CA|SW|RT)\s+(\d+)\s+(\d+)\s+0x\S+\s.* - .*\( '(.*)' - '.*' \)$", re.MULTILINE)
_LIMIT = re.compile(r"^VLHighLimit:\.*(\d+)", re.MULTILINE)
_SL2VL = re.compile(r"^ports: in\s+(\d+), out\s+\d+: \|(.*)\|\s*$", re.MULTILINE)


def check_infiniband(options_file: Path | None = None, weights: Weights = WEIGHTS) -> CheckReport:
    """Reads every linked port of the fabric. `options_file` is OpenSM's, where it runs on this host."""
    deadline = time.monotonic() + FABRIC_TIMEOUT_S
    installed = _text(options_file) if options_file else None
    policy = _policy(installed) if installed is not None else None
    discovered, complaints = run("ibnetdiscover", "-p")
    answers: dict[Port, PortTables | str | None] = {}
    for port in linked_ports(discovered):
        answers[port] = _answer(port, deadline) if port.lid else None
    if not answers:
        raise FabricError("ibnetdiscover finds no port with a link")
    silent = [answer for answer in answers.values() if isinstance(answer, str)]
    if len(silent) == len(answers):
        raise FabricError(silent[0])
    return infiniband.check(answers, installed, weights, policy, complaints)


def check_roce(device: str, weights: Weights = WEIGHTS) -> CheckReport:
    """Reads what the NIC `device` does with priorities."""
    with _understood("dcb"):
        parts = (run("dcb", "-N", "-j", part, "show", "dev", device)[0] for part in ("app", "ets", "pfc"))
        app, ets, pfc = (_json(part, dict[str, Any], {}) for part in parts)
        return roce.check(device, app, ets, pfc, weights)


def check_linux(device: str, rate_bytes_per_s: int | None = None, weights: Weights = WEIGHTS) -> CheckReport:
    """Reads the queueing disciplines of `device`, in this network namespace."""
    with _understood("tc"):
        qdiscs = _json(run("tc", "-j", "qdisc", "show", "dev", device)[0], list[htb.Qdisc], [])
        classes = run("tc", "-details", "class", "show", "dev", device)[0]
        filters = run("tc", "filter", "show", "dev", device)[0]
        return htb.check(device, qdiscs, classes, filters, weights, rate_bytes_per_s)


def linked_ports(text: str) -> list[Port]:
    """Lists the ports of ``ibnetdiscover -p`` that have a link."""
    return sorted(Port(name, int(lid), int(number)) for lid, number, name in _LINK.findall(text))


def port_tables(arbitration: str, sl2vl: str, info: str, simulated: bool) -> PortTables:
    """Reads what `smpquery` prints as vlarb, sl2vl and portinfo of a port. Raises FabricError."""
    with _understood("smpquery"):
        low, _, high = arbitration.partition("# High priority")
        lanes = {came_in: tuple(map(int, row.split("|"))) for came_in, row in _SL2VL.findall(sl2vl)}
        limit = _LIMIT.search(info)
        if not lanes or limit is None or any(len(row) != 16 for row in lanes.values()):
            raise ValueError("not a port's tables")
        return PortTables(None if simulated else int(limit[1]), _table(high), _table(low), lanes)


def run(tool: str, *arguments: str) -> tuple[str, str]:
    """Returns what a tool prints, and what it complains of though it ends well."""
    path = shutil.which(tool, path=_PATH)
    if path is None:
        raise FabricError(f"there is no {tool}: install {PACKAGES[tool]}")
    shown = " ".join([tool, *arguments])
    with TemporaryFile() as out, TemporaryFile() as err:
        try:
            code = subprocess.run(
                [path, *arguments], stdout=out, stderr=err, timeout=TIMEOUT_S, preexec_fn=_bound_output
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise FabricError(f"{shown} did not end within {TIMEOUT_S:g} s") from error
        except OSError as error:
            raise FabricError(f"{path} can't be run: {error.strerror}") from error
        if max(os.fstat(stream.fileno()).st_size for stream in (out, err)) >= MAX_BYTES:
            raise FabricError(f"{shown} printed {MAX_BYTES:,} bytes or more: too much to be of a fabric")
        printed, complaints = (_printed(stream) for stream in (out, err))
    if code:
        said = complaints if complaints.strip() else printed
        hint = next((f"; {advice}" for sign, advice in _HINTS if sign in said), "")
        raise FabricError(f"{shown}: {_words(said) or f'exit code {code}'}{hint}")
    return printed, _words(complaints)


@contextmanager
def _understood(tool: str) -> Iterator[None]:
    """Makes a FabricError of output that is not what `tool` prints: the one place where it is refused."""
    try:
        yield
    except (ValueError, KeyError, RecursionError, msgspec.MsgspecError) as error:
        what = _words(str(error)) or type(error).__name__
        raise FabricError(f"{tool} printed something else than expected ({what}); is it of another version?") from error


def _answer(port: Port, deadline: float) -> PortTables | str:
    """Returns a port's tables, or why there are none: one that is silent must not hide all others."""
    if time.monotonic() > deadline:
        return f"not asked: the fabric took longer than {FABRIC_TIMEOUT_S:g} s"
    where = (str(port.lid), str(port.number))
    try:
        vlarb, sl2vl, info = (run("smpquery", operation, *where)[0] for operation in ("vlarb", "sl2vl", "portinfo"))
        return port_tables(vlarb, sl2vl, info, SIMULATOR_VARIABLE in os.environ)
    except FabricError as error:
        return str(error)


def _policy(installed: str) -> str | FabricError:
    try:
        return _text(Path(infiniband.policy_file(installed)))
    except FabricError as error:
        return error


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise FabricError(f"{file} is no file of OpenSM's: it has more than {MAX_BYTES:,} bytes")
        return content.decode()
    except OSError as error:
        raise FabricError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise FabricError(f"{str(file)!r} can't be read: it is no text") from error


def _printed(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().decode(errors="replace"))


def _words(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= MAX_SAID else f"{words[:MAX_SAID]}…"


def _bound_output() -> None:
    """In the tool: the kernel ends it where it has written too much."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (MAX_BYTES if most == resource.RLIM_INFINITY else min(MAX_BYTES, most), most)
    )


def _table(text: str) -> Table:
    lanes, weights = (re.findall(rf"^{row}\s*:\s*\|(.*)\|\s*$", text, re.MULTILINE) for row in ("VL", "WEIGHT"))
    table: dict[int, int] = {}
    for lane, weight in zip("|".join(lanes).split("|"), "|".join(weights).split("|"), strict=True):
        if lane and int(weight, 16):
            table[int(lane, 16)] = table.get(int(lane, 16), 0) + int(weight, 16)
    return table


def _json(text: str, kind: type[Kind], empty: Kind) -> Kind:
    return msgspec.json.decode(text, type=kind) if text.strip() else empty
