"""What can be said of a testbed without building one."""

import pytest

from dualpath.lab.fabric.htb import shaping
from dualpath.lab.testbed import iproute
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.plan import Rates, make_plan, rate_of


def test_every_node_has_the_nics_of_its_part() -> None:
    plan = make_plan("bed", 2, 3)
    assert [node.name for node in plan.nodes] == ["head", "storage", "pe0", "pe1", "de0", "de1", "de2"]
    assert {node.name: [device.name for device in node.devices] for node in plan.nodes if not node.is_engine} == {
        "head": ["mgmt0", "snic0"],
        "storage": ["mgmt0", "snic0"],
    }
    assert all([d.name for d in node.devices] == ["mgmt0", "snic0", "cnic0"] for node in plan.nodes if node.is_engine)
    assert plan.node("pe1").address("compute") == "10.87.2.11" and plan.node("de0").address("storage") == "10.87.1.12"


def test_names_and_addresses_are_unique_and_fit_the_kernel() -> None:
    plan = make_plan("longname", 100, 100, "10.250")
    devices = [device for node in plan.nodes for device in node.devices]
    assert len({device.address for device in devices} | {plan.host_address}) == len(devices) + 1
    assert len({device.port for device in devices}) == len(devices)
    assert max(len(name) for name in (plan.host_link, *(device.port for device in devices))) <= 15
    assert all(node.namespace.startswith(plan.prefix) for node in plan.nodes) and plan.switch.startswith(plan.prefix)
    assert not make_plan("bed2", 1, 1).prefix.startswith(make_plan("bed", 1, 1).prefix), "down finds its own only"


def test_only_engines_and_the_storage_node_have_rates() -> None:
    plan, rates = make_plan("bed", 1, 1), Rates(snic=3, cnic=5, storage_node=7)
    found = {(node.name, d.name): rate_of(node, d, rates) for node in plan.nodes for d in node.devices}
    assert {name: rate for name, rate in found.items() if rate is not None} == {
        ("storage", "snic0"): 7,
        ("pe0", "snic0"): 3,
        ("pe0", "cnic0"): 5,
        ("de0", "snic0"): 3,
        ("de0", "cnic0"): 5,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Bed", 1, 1), "can't be a testbed's name"),
        (("ninechars", 1, 1), "1 to 8"),
        (("bed-1", 1, 1), "can't be a testbed's name"),
        (("bed", 0, 1), "at least 1 prefill and 1 decode engine"),
        (("bed", 100, 101), "at most 200 in all"),
        (("bed", 1, 1, "10.300"), "first half of an IPv4 address"),
        (("bed", 1, 1, "10.1.2"), "first half of an IPv4 address"),
    ],
)
def test_testbeds_that_can_not_be(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(*arguments)


def test_classes_share_99_to_1_and_may_each_take_all() -> None:
    lines = shaping("cnic0", 100_000_000, "classes")
    high, low = (next(line for line in lines if f"classid {name} " in line) for name in ("1:10", "1:20"))
    assert "rate 792000000bit ceil 800000000bit" in high and high.endswith("prio 0")
    assert "rate 8000000bit ceil 800000000bit" in low and low.endswith("prio 1")
    assert any("u32 match ip tos 0xb8 0xfc flowid 1:10" in line for line in lines)


def test_one_queue_has_no_classes_and_no_rate_has_nothing() -> None:
    assert not any("1:10" in line for line in shaping("cnic0", 100_000_000, "fifo"))
    assert shaping("cnic0", None, "classes") == ["qdisc replace dev cnic0 root noqueue"]


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iproute, "_PATH", "/nowhere")
    with pytest.raises(TestbedError, match="there is no ip and no tc: install iproute2"):
        iproute.check_tools()


def test_nobody_but_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iproute, "_which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(iproute.os, "geteuid", lambda: 1000)
    with pytest.raises(TestbedError, match="need root"):
        iproute.check_tools()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'RTNETLINK answers: Operation not permitted' >&2; exit 2", "run as root with CAP_NET_ADMIN"),
        ("echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2", "the kernel lacks it"),
        ("exit 7", "exit code 7"),
    ],
)
def test_what_a_tool_says_is_explained(tmp_path, monkeypatch, script: str, message: str) -> None:
    tool = tmp_path / "tc"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(iproute, "_PATH", str(tmp_path))
    with pytest.raises(TestbedError, match=f"^tc qdisc add: .*{message}"):
        iproute.run("tc", "qdisc", "add")


def test_the_line_of_a_batch_that_failed_is_shown(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "tc"
    tool.write_text("#!/bin/sh\ncat >/dev/null\necho 'Error: bad.\nCommand failed -:2' >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(iproute, "_PATH", str(tmp_path))
    with pytest.raises(TestbedError, match="'second line': Error: bad"):
        iproute.batch("tc", "ns", ["first line", "second line", "third"])


def test_a_tool_that_hangs_is_given_up(tmp_path, monkeypatch) -> None:
    tool = tmp_path / "ip"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(iproute, "_PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(iproute, "TIMEOUT_S", 0.2)
    with pytest.raises(TestbedError, match=r"ip link did not end within 0\.2 s"):
        iproute.run("ip", "link")
