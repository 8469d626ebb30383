"""What `dcb` and `mlnx_qos` make of a script: their grammar (dcb(8), dcb-ets(8) and so on), and a NIC's state.

A command outside of the grammar, or one that a driver would refuse, is an AssertionError.
"""

import re
from typing import Any

MAP = r"(?:\d:\w+ ?)+"
DCB = {
    "dcbx": re.compile(r"dcb dcbx set dev (\S+) host ieee"),
    "app": re.compile(r"dcb app replace dev (\S+) dscp-prio ((?:\d{1,2}:[0-7] ?)+)"),
    "ets": re.compile(rf"dcb ets set dev (\S+) willing (on|off) prio-tc ({MAP}) tc-tsa ({MAP}) tc-bw ({MAP})"),
    "pfc": re.compile(rf"dcb pfc set dev (\S+) prio-pfc ({MAP})"),
}
EIGHT = r"\w+(?:,\w+){7}"
MLNX = {
    "trust": re.compile(r"mlnx_qos -i (\S+) --trust (dscp|pcp)"),
    "dscp2prio": re.compile(r"mlnx_qos -i (\S+) --dscp2prio set,(\d{1,2}),([0-7])"),
    "tc": re.compile(rf"mlnx_qos -i (\S+) --prio_tc ({EIGHT}) --tsa ({EIGHT}) --tcbw ({EIGHT})"),
    "pfc": re.compile(rf"mlnx_qos -i (\S+) --pfc ({EIGHT})"),
}


def fresh() -> dict[str, Any]:
    """A NIC as it comes, as ``dcb -N -j app|ets|pfc show`` says."""
    ets = {"willing": True, "prio_tc": [0] * 8, "tc_tsa": ["strict"] * 8, "tc_bw": [0] * 8}
    return {"app": {}, "ets": ets, "pfc": {"prio_pfc": [False] * 8}}


def execute(script: str, device: str) -> dict[str, Any]:
    """Returns the state of `device` after a rendered script."""
    state = fresh()
    first, *commands = script.splitlines()
    assert first == "#!/bin/sh -e"
    for command in (line for line in commands if not line.startswith("#")):
        grammar = DCB if command.startswith("dcb ") else MLNX
        matches = {name: match for name, form in grammar.items() if (match := form.fullmatch(command))}
        assert len(matches) == 1, f"no such command: {command}"
        ((name, match),) = matches.items()
        assert match[1] == device
        (_dcb if grammar is DCB else _mlnx)(state, name, match)
    if "mlnx_qos" in script:
        state["ets"]["willing"] = False  # the tool puts the OS in control
    return state


def _dcb(state: dict[str, Any], name: str, match: re.Match[str]) -> None:
    if name == "app":
        state["app"]["dscp_prio"] = sorted([int(code), int(prio)] for code, prio in _pairs(match[2]))
    elif name == "ets":
        whole = [_eight(match[n]) for n in (3, 4, 5)]
        _set_ets(state, [int(tc) for tc in whole[0]], whole[1], [int(share) for share in whole[2]])
        state["ets"]["willing"] = match[2] == "on"
    elif name == "pfc":
        state["pfc"]["prio_pfc"] = [{"on": True, "off": False}[one] for one in _eight(match[2])]


def _mlnx(state: dict[str, Any], name: str, match: re.Match[str]) -> None:
    if name == "dscp2prio":
        state["app"].setdefault("dscp_prio", []).append([int(match[2]), int(match[3])])
        state["app"]["dscp_prio"].sort()
    elif name == "tc":
        prio_tc, tsa, bw = (match[n].split(",") for n in (2, 3, 4))
        _set_ets(state, list(map(int, prio_tc)), tsa, list(map(int, bw)))
    elif name == "pfc":
        state["pfc"]["prio_pfc"] = [one == "1" for one in match[2].split(",")]


def _set_ets(state: dict[str, Any], prio_tc: list[int], tsa: list[str], bw: list[int]) -> None:
    """As iproute2 and the drivers check it: 802.1Q wants 100 % in all, and nothing for classes that are not ETS."""
    assert all(0 <= tc < 8 for tc in prio_tc) and set(tsa) <= {"ets", "strict"}
    assert sum(bw) == 100 and all(0 <= share <= 100 for share in bw)
    assert all(share == 0 for kind, share in zip(tsa, bw, strict=True) if kind != "ets")
    assert all(share > 0 for kind, share in zip(tsa, bw, strict=True) if kind == "ets")
    state["ets"] |= {"prio_tc": prio_tc, "tc_tsa": tsa, "tc_bw": bw}


def _pairs(text: str) -> list[list[str]]:
    return [pair.split(":") for pair in text.split()]


def _eight(text: str) -> list[str]:
    pairs = _pairs(text)
    assert [key for key, _ in pairs] == list("01234567")
    return [value for _, value in pairs]
