"""RoCE: what is rendered is in the tools' grammar, its arithmetic holds, and its check finds what is damaged."""

from typing import Any

import pytest
from drivers import execute, fresh
from hypothesis import given
from hypothesis import strategies as st

from dualpath.lab.fabric import roce

DEVICE = "eth2"
NOT_100 = (
    "drivers refuse weights that are not 100 % in all, and keep what they had; "
    "KV has 1.10% of a link that model messages fill, instead of 1.01%"
)
SHARES = st.tuples(st.integers(1, 1000), st.integers(1, 1000)).map(lambda pair: (max(pair), min(pair)))


def state(tool: str = "dcb", weights: tuple[int, int] = (99, 1)) -> dict[str, Any]:
    return execute(roce.render(DEVICE, weights)[f"{tool}-{DEVICE}.sh"], DEVICE)


@given(SHARES)
def test_both_tools_are_told_the_same_and_it_is_as_meant(weights: tuple[int, int]) -> None:
    assert state("dcb", weights) == state("mlnx_qos", weights)
    report = roce.check(DEVICE, **state("dcb", weights), weights=weights)
    assert report.differences == () and report.compared > 20


@given(SHARES)
def test_weights_are_whole_percents_that_keep_the_ratio(weights: tuple[int, int]) -> None:
    rest, kv, high, *unused = roce.bandwidth(weights)
    assert rest + kv + high == 100 and not any(unused)
    assert min(rest, kv) >= 1 and high >= kv
    assert kv == 1 or abs(kv / (kv + high) - weights[1] / sum(weights)) <= 1 / 99


@given(SHARES)
def test_rdma_is_lossless_and_nothing_else_is(weights: tuple[int, int]) -> None:
    set_up = state("dcb", weights)
    priority_of = dict(set_up["app"]["dscp_prio"])
    lossless = {priority for priority, on in enumerate(set_up["pfc"]["prio_pfc"]) if on}
    assert lossless == {priority_of[one.dscp] for one in (roce.HIGH, roce.LOW)}
    assert 0 not in lossless, "unmarked traffic"
    classes = [set_up["ets"]["prio_tc"][priority] for priority in sorted(lossless)]
    assert len(set(classes)) == 2 and 0 not in classes


def test_processes_mark_what_nics_are_told_to_look_for() -> None:
    environment = roce.render(DEVICE)["engine.env"].splitlines()
    assert "UCX_IB_TRAFFIC_CLASS=32" in environment and "NCCL_IB_TC=184" in environment


def test_dscps_that_nics_put_in_a_lossless_queue_by_themselves_are_put_elsewhere() -> None:
    """A NIC's own table has a DSCP's class selector as its priority."""
    table = {dscp: dscp >> 3 for dscp in range(64)} | dict(state()["app"]["dscp_prio"])
    assert [dscp for dscp, priority in table.items() if roce.PFC[priority]] == [roce.LOW.dscp, roce.HIGH.dscp]


def test_weights_that_whole_percents_can_not_keep_are_said() -> None:
    note = "999:1 can't be kept here: KV has 1.01% of a link that model messages fill, not 0.10%"
    assert roce.notes((999, 1)) == (note,) and roce.notes((99, 1)) == ()
    assert roce.check(DEVICE, **state("dcb", (999, 1)), weights=(999, 1)).notes == (note,)
    assert f"# {note}\n" in roce.render(DEVICE, (999, 1))[f"dcb-{DEVICE}.sh"]


def edited(part: str, key: str, value: Any) -> dict[str, Any]:
    damaged = state()
    damaged[part] = damaged[part] | {key: value}
    return damaged


@pytest.mark.parametrize(
    ("damaged", "what", "follows"),
    [
        (
            edited("app", "dscp_prio", [[8, 5], [46, 5]]),
            "priority of DSCP 8 (KV)",
            "the lossless queue of model messages carries KV",
        ),
        (
            edited("app", "dscp_prio", [[46, 5]]),
            "priority of DSCP 8 (KV)",
            "the lossy queue of all other traffic carries KV",
        ),
        (
            edited("app", "dscp_prio", [[0, 1], [8, 1], [46, 5]]),
            "priority of DSCP 0 (unmarked)",
            "all unmarked traffic queues with KV",
        ),
        (
            edited("pfc", "prio_pfc", [True, False, False, False, False, True, False, False]),
            "PFC of priority 0",
            "priority 0 carries no RDMA: one slow receiver of it stops senders all over the fabric",
        ),
        (
            edited("pfc", "prio_pfc", [False] * 5 + [True, False, False]),
            "PFC of priority 1",
            "a full queue drops KV, and RDMA sends again what was dropped, slowly",
        ),
        (
            edited("ets", "tc_bw", [1, 1, 90, 0, 0, 0, 0, 0]),
            "sum of ETS weights",
            NOT_100,
        ),
        (
            edited("ets", "tc_bw", [1, 49, 50, 0, 0, 0, 0, 0]),
            "ETS weights of traffic classes 0 to 2",
            "KV has 49.49% of a link that model messages fill, instead of 1.01%",
        ),
        (
            edited("ets", "tc_tsa", ["ets", "ets", "strict", *["strict"] * 5]),
            "scheduling of traffic classes 0 to 2",
            "KV gets nothing while model messages fill the link",
        ),
        (
            edited("ets", "prio_tc", [0, 2, 0, 0, 0, 2, 2, 2]),
            "traffic class of priority 1",
            "traffic class 2 carries KV, with model messages, priority 6, priority 7",
        ),
        (
            edited("app", "default_prio", [5]),
            "priority of DSCP 0 (unmarked)",
            "all unmarked traffic queues with model messages",
        ),
        (
            edited("app", "dscp_prio", [[8, 1], [26, 5], [46, 5]]),
            "other DSCPs of priority 5",
            "what is marked so queues with model messages, in their lossless queue",
        ),
        (
            edited("app", "dscp_prio", [[8, 1], [46, 0], [46, 5]]),
            "priority of DSCP 46 (model messages)",
            "the lossy queue of all other traffic or the lossless queue of model messages carries model messages",
        ),
        (
            edited("app", "dgram_port_prio", [[4791, 0]]),
            "rules by something else than DSCP",
            "they may give either class another priority",
        ),
        (
            edited("ets", "tc_tsa", ["strict", "ets", "ets", *["strict"] * 5]),
            "scheduling of traffic classes 0 to 2",
            "what is in traffic class 0 goes before both classes, and may leave them nothing",
        ),
        (
            edited("ets", "prio_tc", [7, 1, 0, 0, 0, 2, 2, 2]),
            "traffic class of priority 0",
            "traffic class 7 carries priority 0, with nothing else; it goes before both classes",
        ),
        (edited("ets", "willing", True), "willing", "the switch's DCBX may replace these settings at any time"),
    ],
)
def test_a_damaged_nic_is_found_and_named(damaged: dict[str, Any], what: str, follows: str) -> None:
    report = roce.check(DEVICE, **damaged)
    assert follows in [one.follows for one in report.differences if one.what == what], report.differences


def test_a_nic_as_it_comes_differs_in_everything() -> None:
    found = {one.what for one in roce.check(DEVICE, **fresh()).differences}
    assert {"priority of DSCP 8 (KV)", "PFC of priority 5", "willing", "sum of ETS weights"} <= found
    assert roce.check(DEVICE, {}, {}, {}).differences, "a driver that shows nothing"
