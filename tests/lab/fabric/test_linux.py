"""HTB by DSCP: rendered, installed in a namespace, read back; and damaged there, each damage found and named."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dualpath.lab.fabric import htb
from dualpath.lab.fabric.findings import CheckReport, FabricError
from dualpath.lab.fabric.reading import check_linux

RATE = 125_000_000
SPACE = f"dualpath-q{os.getpid() % 1_000_000}"
DEVICE = "cnic0"
QDISCS = [{"kind": "htb", "handle": "1:", "root": True, "options": {"default": "0x20"}}]
CLASSES = """\
class htb 1:10 parent 1:1 leaf 10: prio 0 rate 990Mbit ceil 1Gbit burst 124863b cburst 125000b
class htb 1:1 root rate 1Gbit ceil 1Gbit burst 125000b cburst 125000b
class htb 1:20 parent 1:1 leaf 20: prio 1 rate 10Mbit ceil 1Gbit burst 125000b cburst 125000b
"""
FILTERS = [
    {"protocol": "ip", "kind": "u32"},
    {"protocol": "ip", "options": {"flowid": "1:10", "match": {"value": "b80000", "mask": "fc0000", "off": 0}}},
    {"protocol": "ipv6", "options": {"flowid": "1:10", "match": {"value": "b800000", "mask": "fc00000", "off": 0}}},
]


def check(classes: str = CLASSES, **changed) -> CheckReport:
    return htb.check(
        DEVICE, **({"qdiscs": QDISCS, "filters": FILTERS, "rate_bytes_per_s": RATE} | changed), classes=classes
    )


def test_what_tc_shows_of_what_is_rendered_is_as_meant() -> None:
    assert check().is_as_meant
    assert check(rate_bytes_per_s=None).is_as_meant


@pytest.mark.parametrize(
    ("report", "what", "follows"),
    [
        (
            check(CLASSES.replace("rate 10Mbit ceil 1Gbit", "rate 10Mbit ceil 10Mbit")),
            "ceiling of the low class (KV)",
            "it borrows nothing: the low class (KV) may not use what the other leaves idle",
        ),
        (
            check(CLASSES.replace("rate 990Mbit", "rate 500Mbit")),
            "rate of the high class",
            "other shares than meant",
        ),
        (
            check(CLASSES.replace("prio 1", "prio 0")),
            "priority of the low class (KV)",
            "what the link has to spare does not go to model messages first",
        ),
        (
            check("".join(line for line in CLASSES.splitlines(True) if "1:20" not in line)),
            "the low class (KV)",
            "its packets bypass the classes",
        ),
        (
            check(rate_bytes_per_s=2 * RATE),
            "rate of the link",
            "the shares are of another rate than the link's: they don't hold, or the link is not used in full",
        ),
        (
            check(filters=FILTERS[2:]),
            "ip filter of DSCP 46",
            "model messages over ip queue with KV, in the low class",
        ),
        (
            check(qdiscs=[QDISCS[0] | {"options": {"default": "0"}}]),
            "class of unmarked traffic",
            "traffic without a mark bypasses the classes and their rate",
        ),
        (
            check(qdiscs=[{"kind": "noqueue", "root": True}]),
            "root qdisc",
            "one queue for all: KV delays messages",
        ),
    ],
    ids=["no-borrow", "weight", "priority", "no-class", "rate", "no-filter", "default", "no-htb"],
)
def test_a_damaged_device_is_found_and_named(report: CheckReport, what: str, follows: str) -> None:
    assert (what, follows) in [(one.what, one.follows) for one in report.differences]


@pytest.fixture
def space() -> Iterator[str]:
    """A namespace with a link in it."""
    add = ["ip netns add {0}", "ip -n {0} link add {1} type veth peer name other", "ip -n {0} link set {1} up"]
    try:
        for line in add:
            subprocess.run(line.format(SPACE, DEVICE).split(), check=True, capture_output=True)
        subprocess.run(f"tc -n {SPACE} qdisc add dev other root htb".split(), check=True, capture_output=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        subprocess.run(["ip", "netns", "delete", SPACE], check=False, capture_output=True)
        pytest.skip(f"no namespace with HTB here: {getattr(error, 'stderr', error)}")
    yield SPACE
    subprocess.run(["ip", "netns", "delete", SPACE], check=True)


def qos(*words: str, inside: str) -> subprocess.CompletedProcess[str]:
    command = ["ip", "netns", "exec", inside, sys.executable, "-m", "dualpath", "qos", *words]
    return subprocess.run(
        [*command, "--fabric", "linux", "--device", DEVICE], capture_output=True, text=True, timeout=60
    )


def tc(space: str, lines: str) -> None:
    subprocess.run(["tc", "-n", space, "-batch", "-"], input=lines, text=True, check=True)


@pytest.mark.privileged
def test_rendered_installed_and_read_back_on_a_real_kernel(space: str) -> None:
    rendered = qos("render", "--rate", "125MB/s", inside=space)
    assert rendered.returncode == 0
    tc(space, rendered.stdout)
    checked = qos("check", "--rate", "125MB/s", inside=space)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.startswith("linux: no difference; ")


@pytest.mark.privileged
def test_damaged_on_a_real_kernel(space: str) -> None:
    tc(space, qos("render", "--rate", "125MB/s", inside=space).stdout)
    tc(
        space,
        f"class change dev {DEVICE} parent 1:1 classid 1:20 htb rate 100mbit ceil 100mbit prio 1\n"
        f"filter del dev {DEVICE} parent 1: protocol ip prio 1\n",
    )
    checked = qos("check", inside=space)
    assert checked.returncode == 1
    for said in ("rate of the low class (KV)", "it borrows nothing", "model messages over ip queue with KV"):
        assert said in checked.stdout
    assert "ipv6" not in checked.stdout


def test_a_device_that_is_not_there_can_not_be_checked() -> None:
    with pytest.raises(FabricError, match=r"tc -j qdisc show dev nowhere0: Cannot find device .*; name one that"):
        check_linux("nowhere0")
