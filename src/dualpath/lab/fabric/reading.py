"""Reads a fabric back with its own tools: `ibnetdiscover` and `smpquery`, `dcb`, `tc`; then checks it.

Nothing is changed. Every function raises FabricError if a tool is missing, refuses, or says what can't be understood.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from dualpath.core.traffic_classes import WEIGHTS
from dualpath.lab.fabric import htb, infiniband, roce
from dualpath.lab.fabric.findings import CheckReport, FabricError, Weights
from dualpath.lab.fabric.infiniband import Port, PortTables, Table

TIMEOUT_S = 60.0
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
    try:
        installed = options_file.read_text() if options_file else None
    except OSError as error:
        raise FabricError(f"{options_file} can't be read: {error.strerror}") from error
    ports = linked_ports(run("ibnetdiscover", "-p"))
    if not ports:
        raise FabricError("ibnetdiscover finds no port with a link")
    return infiniband.check({port: _tables(port) if port.lid else None for port in ports}, installed, weights)


def check_roce(device: str, weights: Weights = WEIGHTS) -> CheckReport:
    """Reads what the NIC `device` does with priorities."""
    app, ets, pfc = (_json(run("dcb", "-N", "-j", part, "show", "dev", device), {}) for part in ("app", "ets", "pfc"))
    return roce.check(device, app, ets, pfc, weights)


def check_linux(device: str, rate_bytes_per_s: int | None = None, weights: Weights = WEIGHTS) -> CheckReport:
    """Reads the queueing disciplines of `device`, in this network namespace."""
    qdiscs = _json(run("tc", "-j", "qdisc", "show", "dev", device), [])
    filters = _json(run("tc", "-j", "filter", "show", "dev", device), [])
    return htb.check(device, qdiscs, run("tc", "class", "show", "dev", device), filters, weights, rate_bytes_per_s)


def linked_ports(text: str) -> list[Port]:
    """Lists the ports of ``ibnetdiscover -p`` that have a link."""
    return sorted(Port(name, int(lid), int(number)) for lid, number, name in _LINK.findall(text))


def port_tables(arbitration: str, sl2vl: str, info: str, simulated: bool) -> PortTables:
    """Reads what `smpquery` prints as vlarb, sl2vl and portinfo of a port. Raises FabricError."""
    low, _, high = arbitration.partition("# High priority")
    lanes = {came_in: tuple(map(int, row.split("|"))) for came_in, row in _SL2VL.findall(sl2vl)}
    limit = _LIMIT.search(info)
    if not lanes or limit is None or any(len(row) != 16 for row in lanes.values()):
        raise FabricError("smpquery printed something else than a port's tables; is it of another version?")
    return PortTables(None if simulated else int(limit[1]), _table(high), _table(low), lanes)


def run(tool: str, *arguments: str) -> str:
    """Returns what a tool prints."""
    path = shutil.which(tool, path=_PATH)
    if path is None:
        raise FabricError(f"there is no {tool}: install {PACKAGES[tool]}")
    shown = " ".join([tool, *arguments])
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise FabricError(f"{shown} did not end within {TIMEOUT_S:g} s") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        hint = next((f"; {advice}" for sign, advice in _HINTS if sign in said), "")
        raise FabricError(f"{shown}: {said}{hint}")
    return done.stdout


def _tables(port: Port) -> PortTables:
    where = (str(port.lid), str(port.number))
    arbitration, sl2vl, info = (run("smpquery", operation, *where) for operation in ("vlarb", "sl2vl", "portinfo"))
    return port_tables(arbitration, sl2vl, info, SIMULATOR_VARIABLE in os.environ)


def _table(text: str) -> Table:
    lanes, weights = (re.findall(rf"^{row}\s*:\s*\|(.*)\|\s*$", text, re.MULTILINE) for row in ("VL", "WEIGHT"))
    table: dict[int, int] = {}
    for lane, weight in zip("|".join(lanes).split("|"), "|".join(weights).split("|"), strict=True):
        if lane and int(weight, 16):
            table[int(lane, 16)] = table.get(int(lane, 16), 0) + int(weight, 16)
    return table


def _json(text: str, empty: Any) -> Any:
    return json.loads(text) if text.strip() else empty
