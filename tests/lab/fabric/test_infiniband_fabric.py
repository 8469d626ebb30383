"""InfiniBand for real: what is rendered goes through OpenSM on a simulated fabric, and `qos check` reads it back."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import simulated
from simulated import HOSTS, Fabric

from dualpath.lab.fabric import infiniband

RENDERED = infiniband.render()
OPTIONS, POLICY = RENDERED["opensm-qos.conf"], RENDERED["qos-policy.conf"]


@pytest.fixture
def fabric(tmp_path: Path) -> Iterator[Fabric]:
    if (why := simulated.missing()) is not None:
        pytest.skip(why)
    with simulated.fabric(tmp_path) as running:
        yield running


def check(fabric: Fabric, *options: str) -> tuple[int, dict]:
    """Runs the command as an operator does. Returns its exit code and report."""
    report = fabric.folder / "report.json"
    command = [sys.executable, "-m", "dualpath", "qos", "check", "--fabric", "infiniband", "--json", str(report)]
    done = fabric.run([*command, *options])
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(report.read_bytes())


def replaced(name: str, value: str) -> str:
    lines = [f"{name} {value}" if line.split()[0] == name else line for line in OPTIONS.splitlines()]
    assert lines != OPTIONS.splitlines()
    return "\n".join(lines)


def test_what_is_rendered_is_read_back_without_difference(fabric: Fabric, tmp_path: Path) -> None:
    fabric.sweep(OPTIONS, POLICY)
    code, report = check(fabric, "--opensm-conf", str(tmp_path / "opensm.conf"))
    assert (code, report["differences"]) == (0, [])
    linked = {f"{host} port 1" for host in HOSTS} | {f"Sw1 port {n}" for n in range(1, len(HOSTS) + 1)}
    assert set(report["places"]) == linked
    assert "ibsim" in report["notes"][0], "a port's high limit can't be had of it"


@pytest.mark.parametrize(
    ("options", "what", "places", "follows"),
    [
        (
            replaced("qos_vlarb_high", "0:192,1:192,2:192,3:192"),
            "high table, lane:weight",
            8,
            "KV has 50.50% of a link that model messages fill, instead of 1.00%, if the high limit is as meant",
        ),
        (
            replaced("qos_sl2vl", "0,1,1,3,0,0,0,0,0,0,0,0,0,0,0,0"),
            "virtual lane of service level 2 (KV)",
            8,
            "KV has 50.00% of a link that model messages fill, instead of 1.00%, if the high limit is as meant",
        ),
        (
            replaced("qos_sl2vl", "0,1,0,3,0,0,0,0,0,0,0,0,0,0,0,0"),
            "virtual lane of service level 2 (KV)",
            8,
            "KV and model messages share lane 0: messages wait behind KV",
        ),
        (
            replaced("qos_sl2vl", "0,1,15,3,0,0,0,0,0,0,0,0,0,0,0,0"),
            "virtual lane of service level 2 (KV)",
            8,
            "the port drops KV: their service level has no lane",
        ),
        (
            f"{OPTIONS}qos_swe_vlarb_low 0:192,1:192,2:0,3:192\n",
            "low table, lane:weight",
            4,
            "KV gets nothing while model messages fill the link, if the high limit is as meant",
        ),
    ],
    ids=["weight", "swapped-lane", "shared-lane", "no-lane", "switches-left-out"],
)
def test_a_wrong_file_is_found_in_the_ports(fabric: Fabric, options: str, what: str, places: int, follows: str) -> None:
    fabric.sweep(options, POLICY)
    code, report = check(fabric)
    assert code == 1
    (found,) = [one for one in report["differences"] if one["what"] == what]
    assert (len(found["places"]), found["follows"]) == (places, follows)


def test_qos_that_is_off_is_found(fabric: Fabric, tmp_path: Path) -> None:
    fabric.sweep(replaced("qos", "FALSE"), POLICY)
    code, report = check(fabric, "--opensm-conf", str(tmp_path / "opensm.conf"))
    assert code == 1
    found = {one["what"]: one for one in report["differences"]}
    assert "OpenSM programs no port" in found["qos"]["follows"]
    assert len(found["low table, lane:weight"]["places"]) == 8


def test_a_high_limit_is_found_in_the_file(fabric: Fabric, tmp_path: Path) -> None:
    fabric.sweep(replaced("qos_high_limit", "255"), POLICY)
    code, report = check(fabric, "--opensm-conf", str(tmp_path / "opensm.conf"))
    assert code == 1
    (found,) = report["differences"]
    assert (found["what"], found["meant"], found["found"]) == ("qos_high_limit", "99", "255")


@pytest.mark.parametrize(
    ("options", "policy", "what", "follows"),
    [
        (f"{OPTIONS}qos_ca_high_limit 0\n", POLICY, "qos_ca_high_limit", "HCAs are left out: they get this instead"),
        (
            OPTIONS,
            POLICY.replace("default : 0", "default : 2"),
            "default level",
            "every path that asks for no level gets that of KV",
        ),
        (
            OPTIONS,
            POLICY.replace("end-qos", "any, service-id 0x1 : 2\nend-qos"),
            "rules that render does not write",
            "they may give paths of either class the other's service level",
        ),
        (
            replaced("qos_policy_file", "/nowhere/policy.conf"),
            POLICY,
            "file",
            "no path gets KV's level of itself: KV to storage nodes goes with model messages",
        ),
        (
            f"{OPTIONS}routing_engine minhop,lash\n",
            POLICY,
            "routing engine that takes lanes",
            "it gives paths service levels of its own: KV and model messages may share lanes",
        ),
    ],
    ids=["limit-0", "policy-level", "policy-rule", "no-policy", "lash"],
)
def test_what_ports_do_not_show_is_found_in_the_files(
    fabric: Fabric, tmp_path: Path, options: str, policy: str, what: str, follows: str
) -> None:
    fabric.sweep(options, policy)
    code, report = check(fabric, "--opensm-conf", str(tmp_path / "opensm.conf"))
    assert code == 1
    assert [(one["what"], one["follows"]) for one in report["differences"]] == [(what, follows)]


def test_what_opensm_takes_as_the_same_is_no_difference(fabric: Fabric, tmp_path: Path) -> None:
    same = OPTIONS.replace(" ", "\t").replace("0:0,1:0,2:64,3:0", '"2:64"').replace("qos_max_vls\t4", "qos_max_vls 2")
    fabric.sweep(f"{same}qos_swe_high_limit -1 # unset\nqos_ca_vlarb_low 2:64,0:0\n", POLICY)
    code, report = check(fabric, "--opensm-conf", str(tmp_path / "opensm.conf"))
    assert (code, report["differences"]) == (0, [])


@pytest.mark.parametrize("value", ["TRUE", '"TRUE"', "TRUE # on", "true", "1", "FALSE", "false", "TRUEx"])
def test_qos_is_on_where_opensm_says_so(value: str, tmp_path: Path) -> None:
    if (why := simulated.missing()) is not None:
        pytest.skip(why)
    (tmp_path / "in").write_text(f"qos {value}\n")
    command = [shutil.which("opensm", path=simulated.PATH) or "opensm", "-F", "in", "-c", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    is_on = "\nqos TRUE\n" in (tmp_path / "out").read_text()
    found = [one.what for one in infiniband.check({}, (tmp_path / "in").read_text()).differences]
    assert ("qos" not in found) == is_on


def test_a_host_that_does_not_answer_is_a_difference(fabric: Fabric) -> None:
    fabric.sweep(OPTIONS, POLICY)
    fabric.order('Error "De1" 100', hosts=3)
    code, report = check(fabric)
    assert code == 1
    (found,) = report["differences"]
    assert (found["what"], found["places"]) == ("discovery", ["the fabric"]) and "timed out" in found["found"]


def test_a_port_without_tables_does_not_hide_the_others(fabric: Fabric) -> None:
    vlarb = 24
    fabric.sweep(OPTIONS, POLICY)
    fabric.order(f'Error "Pe1" 100 {vlarb}', hosts=4)
    code, report = check(fabric)
    assert code == 1
    (found,) = report["differences"]
    assert (found["what"], found["places"]) == ("answer", ["Pe1 port 1"]) and len(report["places"]) == 8


def test_a_port_that_came_after_the_sweep_is_left_out(fabric: Fabric) -> None:
    fabric.order('Unlink "De1"', hosts=3)
    fabric.sweep(OPTIONS, POLICY)
    fabric.order('Link "De1"[1] "Sw1"[4]', hosts=4)
    code, report = check(fabric)
    assert code == 1
    (lid,) = [one for one in report["differences"] if one["what"] == "LID"]
    assert lid["places"] == ["De1 port 1"] and "left out" in lid["follows"]
    assert {place for one in report["differences"] for place in one["places"]} == {"De1 port 1", "Sw1 port 4"}


def test_paths_to_storage_get_kvs_service_level(fabric: Fabric) -> None:
    storage = "0x100007"
    policy = infiniband.render(storage_guids=[storage], policy_file=str(fabric.folder / "qos-policy.conf"))
    with fabric.managed(policy["opensm-qos.conf"], policy["qos-policy.conf"]):
        ports = fabric.lids()
        source = ports["0x0000000000100003"]
        assert fabric.path_level(source, ports["0x0000000000100007"]) == infiniband.LOW.service_level
        assert fabric.path_level(source, ports["0x0000000000100005"]) == infiniband.HIGH.service_level


def test_without_a_device_it_says_that_it_can_not_check() -> None:
    if (why := simulated.missing()) is not None:
        pytest.skip(why)
    if Path("/sys/class/infiniband_mad").exists():
        pytest.skip("this host has InfiniBand")
    command = [sys.executable, "-m", "dualpath", "qos", "check", "--fabric", "infiniband"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "can't check: ibnetdiscover -p: " in done.stderr and "no InfiniBand device" in done.stderr
