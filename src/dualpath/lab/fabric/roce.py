"""RoCE: DSCP → priority → traffic class on every NIC, ETS weights, PFC; for ``dcb`` and ``mlnx_qos``, and their check.

    traffic class 0   all other priorities      ETS 1 %     lossy
    traffic class 1   KV                        ETS 1 %     PFC
    traffic class 2   model messages            the rest    PFC; with it priorities 6 and 7: congestion notifications
                                                            and routing, which must not queue behind data, without PFC

PFC is on for the two RDMA priorities alone: a priority that carries TCP must drop, or one slow host stops the fabric.
Switches want the same table; their commands differ by vendor.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from dualpath.core.traffic_classes import CLASSES, WEIGHTS
from dualpath.core.vocabulary import TrafficClass
from dualpath.lab.fabric.findings import CheckReport, Comparison, Weights, kv_is_left, not_kept

HIGH, LOW = CLASSES[TrafficClass.HIGH], CLASSES[TrafficClass.LOW]
PRIORITIES = range(8)
REST_TC, KV_TC, HIGH_TC = 0, 1, 2
_TC_OF = {LOW.priority: KV_TC, HIGH.priority: HIGH_TC, 6: HIGH_TC, 7: HIGH_TC}
PRIO_TC = tuple(_TC_OF.get(priority, REST_TC) for priority in PRIORITIES)
PFC = tuple(priority in (LOW.priority, HIGH.priority) for priority in PRIORITIES)
TSA = tuple("ets" if tc <= HIGH_TC else "strict" for tc in PRIORITIES)
DSCP_PRIO = {
    **{dscp: 0 for dscp in range(64) if dscp >> 3 in (HIGH.priority, LOW.priority)},
    **{one.dscp: one.priority for one in (HIGH, LOW)},
}
"""NICs map a DSCP to its class selector unless told otherwise: so the selectors' other DSCPs are told."""
_NAMES = {LOW.priority: "KV", HIGH.priority: "model messages"}
Priority = Annotated[int, msgspec.Meta(ge=0, le=7)]
OnOff = bool | Literal["on", "off"]
_UP_TO_8 = msgspec.Meta(max_length=8)


class App(msgspec.Struct):
    """Of ``dcb -N -j app show``: DSCPs and their priorities, and the priority of all that no rule is about."""

    dscp_prio: list[tuple[Annotated[int, msgspec.Meta(ge=0, le=63)], Priority]] = []
    default_prio: list[Priority] = []


class Ets(msgspec.Struct):
    """Of ``dcb -N -j ets show``, each by priority or traffic class; empty where a driver shows none."""

    willing: OnOff = False
    prio_tc: Annotated[list[Priority], _UP_TO_8] = []
    tc_tsa: Annotated[list[str], _UP_TO_8] = []
    tc_bw: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=100)]], _UP_TO_8] = []


class Pfc(msgspec.Struct):
    """Of ``dcb -N -j pfc show``, by priority."""

    prio_pfc: Annotated[list[OnOff], _UP_TO_8] = []


def bandwidth(weights: Weights = WEIGHTS) -> tuple[int, ...]:
    """Returns whole percents by traffic class: 100 in all, and at least 1 for each of the three."""
    kv = max(99 * weights[1] // sum(weights), 1)
    return (1, kv, 99 - kv, 0, 0, 0, 0, 0)


def render(device: str, weights: Weights = WEIGHTS) -> dict[str, str]:
    """Returns files: the same settings for `dcb` (iproute2) and for `mlnx_qos` (NVIDIA's driver package); use one."""
    bw = bandwidth(weights)
    ets = f"prio-tc {_map(enumerate(PRIO_TC))} tc-tsa {_map(enumerate(TSA))} tc-bw {_map(enumerate(bw))}"
    dcb = [
        f"dcb dcbx set dev {device} host ieee",
        f"dcb app replace dev {device} dscp-prio {_map(DSCP_PRIO)}",
        f"dcb ets set dev {device} willing off {ets}",
        f"dcb pfc set dev {device} prio-pfc {_map((p, 'on' if on else 'off') for p, on in enumerate(PFC))}",
    ]
    mlnx = [
        f"mlnx_qos -i {device} --trust dscp",
        *(f"mlnx_qos -i {device} --dscp2prio set,{code},{priority}" for code, priority in DSCP_PRIO.items()),
        f"mlnx_qos -i {device} --prio_tc {_list(PRIO_TC)} --tsa {_list(TSA)} --tcbw {_list(bw)}",
        f"mlnx_qos -i {device} --pfc {_list(map(int, PFC))}",
    ]
    environment = [
        "# for processes whose UCX carries KV alone; for NCCL, whose messages are of the high class",
        f"UCX_IB_TRAFFIC_CLASS={LOW.tos}",
        f"NCCL_IB_TC={HIGH.tos}",
    ]
    return {
        f"dcb-{device}.sh": _script(dcb, weights),
        f"mlnx_qos-{device}.sh": _script(mlnx, weights),
        "engine.env": _text(environment),
    }


def notes(weights: Weights) -> tuple[str, ...]:
    """Returns what is to be said of weights that whole percents can't keep."""
    return not_kept(weights, _kv_share(TSA, bandwidth(weights)))


def check(
    device: str, app: dict[str, Any], ets: dict[str, Any], pfc: dict[str, Any], weights: Weights = WEIGHTS
) -> CheckReport:
    """Compares what ``dcb -N -j app|ets|pfc show`` says of a device with what is meant.

    Raises msgspec.ValidationError for what `dcb` does not say.
    """
    comparison = Comparison()
    _compare_marks(comparison, device, msgspec.convert(app, App))
    others = [name for name, rules in app.items() if rules and name not in App.__struct_fields__]
    so = "they may give either class another priority"
    comparison.compare(device, "rules by something else than DSCP", "none", _list(others) or "none", so)
    _compare_pfc(comparison, device, [one in (True, "on") for one in msgspec.convert(pfc, Pfc).prio_pfc])
    _compare_ets(comparison, device, msgspec.convert(ets, Ets), weights)
    return CheckReport("roce", (device,), comparison.compared, comparison.differences(), notes(weights))


def _compare_marks(comparison: Comparison, device: str, app: App) -> None:
    for marks in (HIGH, LOW):
        found = sorted(priority for code, priority in app.dscp_prio if code == marks.dscp)
        name = _NAMES[marks.priority]
        so = " or ".join(_queue_of(priority) for priority in found or [0]) + f" carries {name}"
        what = f"priority of DSCP {marks.dscp} ({name})"
        comparison.compare(device, what, str(marks.priority), _list(found) or "none", so)
    default = max(app.default_prio, default=0)
    default = next((priority for code, priority in app.dscp_prio if code == 0), default)
    so = f"all unmarked traffic queues with {_NAMES.get(default, 'the rest')}"
    comparison.compare(device, "priority of DSCP 0 (unmarked)", 0, default if default in _NAMES else 0, so)
    for priority, name in _NAMES.items():
        others: list[object] = [
            code for code, its in app.dscp_prio if its == priority and code not in (0, HIGH.dscp, LOW.dscp)
        ]
        others += ["any without a rule"] if priority in app.default_prio else []
        so = f"what is marked so queues with {name}, in their lossless queue"
        comparison.compare(device, f"other DSCPs of priority {priority}", "none", _list(others) or "none", so)


def _compare_pfc(comparison: Comparison, device: str, on: list[bool]) -> None:
    found = dict(enumerate(on))
    for priority, meant in enumerate(PFC):
        if meant:
            so = f"a full queue drops {_NAMES[priority]}, and RDMA sends again what was dropped, slowly"
        else:
            so = f"priority {priority} carries no RDMA: one slow receiver of it stops senders all over the fabric"
        comparison.compare(device, f"PFC of priority {priority}", _on(meant), _on(found.get(priority, False)), so)


def _compare_ets(comparison: Comparison, device: str, ets: Ets, weights: Weights) -> None:
    so = "the switch's DCBX may replace these settings at any time"
    comparison.compare(device, "willing", "off", _on(ets.willing in (True, "on")), so)
    prio_tc, tsa, bw = ets.prio_tc, ets.tc_tsa, ets.tc_bw
    strict = [tc for tc, kind in enumerate(tsa) if kind == "strict"]
    for priority, meant in enumerate(PRIO_TC):
        found: int | str = prio_tc[priority] if priority < len(prio_tc) else "none"
        who = _NAMES.get(priority, f"priority {priority}")
        others = [_NAMES.get(p, f"priority {p}") for p, tc in enumerate(prio_tc) if tc == found and p != priority]
        first = "; it goes before both classes" if found in strict else ""
        so = f"traffic class {found} carries {who}, with {', '.join(others) or 'nothing else'}{first}"
        comparison.compare(device, f"traffic class of priority {priority}", meant, found, so)
    if len(tsa) < 8 or len(bw) < 8:
        comparison.compare(device, "ETS", "8 traffic classes", f"{min(len(tsa), len(bw))}", "the NIC keeps no weights")
        return
    effect = kv_is_left(_kv_share(tsa, bw), _kv_share(TSA, bandwidth(weights)))
    if tsa[REST_TC] == "strict":
        effect = "what is in traffic class 0 goes before both classes, and may leave them nothing"
    total = sum(share for kind, share in zip(tsa, bw, strict=True) if kind == "ets")
    so = f"drivers refuse weights that are not 100 % in all, and keep what they had; {effect}"
    comparison.compare(device, "sum of ETS weights", 100, total, so)
    comparison.compare(device, "scheduling of traffic classes 0 to 2", _list(TSA[:3]), _list(tsa[:3]), effect)
    comparison.compare(
        device, "ETS weights of traffic classes 0 to 2", _list(bandwidth(weights)[:3]), _list(bw[:3]), effect
    )


def _kv_share(tsa: Sequence[str], bw: Sequence[int]) -> float:
    """KV's part of a link that model messages fill."""
    if tsa[KV_TC] != "ets" or tsa[HIGH_TC] != "ets":
        return 1.0 if tsa[KV_TC] == "strict" and tsa[HIGH_TC] == "ets" else 0.0
    return bw[KV_TC] / ((bw[KV_TC] + bw[HIGH_TC]) or 1)


def _queue_of(priority: int) -> str:
    kind = "lossless" if PFC[priority] else "lossy"
    return f"the {kind} queue of {_NAMES.get(priority, 'all other traffic')}"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _map(pairs: Any) -> str:
    return " ".join(f"{key}:{value}" for key, value in (pairs.items() if isinstance(pairs, dict) else pairs))


def _list(values: Any) -> str:
    return ",".join(map(str, values))


def _script(commands: list[str], weights: Weights) -> str:
    return _text(["#!/bin/sh -e", *(f"# {note}" for note in notes(weights)), *commands])


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
