"""HTB by DSCP: rendered, installed in a namespace, read back; and damaged there, each damage found and named."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from dualpath.lab.fabric import htb
from dualpath.lab.fabric.findings import CheckReport, FabricError
from dualpath.lab.fabric.reading import check_linux

RATE = 125_000_000
SPACE = f"dualpath-q{os.getpid() % 1_000_000}"
DEVICE = "cnic0"
ROOT = htb.Qdisc("htb", "1:", root=True, options={"default": "0x20"})
QUEUES = [htb.Qdisc("bfifo", f"{leaf}:", f"1:{leaf}", options={"limit": 2_500_000}) for leaf in (10, 20)]
CLASSES = """\
class htb 1:10 parent 1:1 leaf 10: prio 0 quantum 65536 rate 990Mbit ceil 1Gbit burst 124863b/1 mpu 0b cburst 125000b/1
class htb 1:1 root rate 1Gbit ceil 1Gbit linklayer ethernet burst 125000b/1 mpu 0b cburst 125000b/1 mpu 0b level 7
class htb 1:20 parent 1:1 leaf 20: prio 1 quantum 65536 rate 10Mbit ceil 1Gbit burst 125000b/1 mpu 0b cburst 125000b/1
"""
FILTERS = """\
filter parent 1: protocol ip pref 1 u32 chain 0
filter parent 1: protocol ip pref 1 u32 chain 0 fh 800: ht divisor 1
filter parent 1: protocol ip pref 1 u32 chain 0 fh 800::800 order 2048 key ht 800 bkt 0 *flowid 1:10 not_in_hw
  match 00b80000/00fc0000 at 0
filter parent 1: protocol ipv6 pref 2 u32 chain 0
filter parent 1: protocol ipv6 pref 2 u32 chain 0 fh 801: ht divisor 1
filter parent 1: protocol ipv6 pref 2 u32 chain 0 fh 801::800 order 2048 key ht 801 bkt 0 *flowid 1:10 not_in_hw
  match 0b800000/0fc00000 at 0
"""


def check(classes: str = CLASSES, **changed) -> CheckReport:
    return htb.check(
        DEVICE,
        **({"qdiscs": [ROOT, *QUEUES], "filters": FILTERS, "rate_bytes_per_s": RATE} | changed),
        classes=classes,
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
            check(filters=FILTERS[FILTERS.index("filter parent 1: protocol ipv6") :]),
            "ip filter of DSCP 46",
            "model messages over ip queue with KV, in the low class, unless another filter takes them",
        ),
        (
            check(qdiscs=[replace(ROOT, options={"default": "0"}), *QUEUES]),
            "class of unmarked traffic",
            "what no filter matches, KV with it, bypasses the classes and their rate",
        ),
        (
            check(qdiscs=[replace(ROOT, options={"default": "0x10"}), *QUEUES]),
            "class of unmarked traffic",
            "what no filter matches, KV with it, joins the high class",
        ),
        (
            check(qdiscs=[htb.Qdisc("noqueue", "0:", root=True)]),
            "root qdisc",
            "one queue for all, or other classes: KV delays messages",
        ),
    ],
    ids=["no-borrow", "weight", "priority", "no-class", "rate", "no-filter", "default-none", "default-high", "no-htb"],
)
def test_a_damaged_device_is_found_and_named(report: CheckReport, what: str, follows: str) -> None:
    assert (what, follows) in [(one.what, one.follows) for one in report.differences]


def test_a_filter_with_a_second_match_is_not_the_one_that_was_meant() -> None:
    """tc's JSON repeats the key, so that a parser keeps the last match alone."""
    narrower = FILTERS.replace("  match 00b8", "  match 00001388/0000ffff at 20\n  match 00b8")
    assert [one.what for one in check(filters=narrower).differences] == ["ip filter of DSCP 46", "another filter"]


def test_rates_may_be_rounded_as_the_kernel_and_tc_round_them() -> None:
    """The kernel keeps whole bytes, and a burst as 32 bits of time."""
    burst = "burst 64Kb/1 mpu 0b cburst 64Kb/1 mpu 0b"
    tiny = (
        f"class htb 1:1 root rate 8Kbit ceil 8Kbit {burst}\n"
        f"class htb 1:10 parent 1:1 leaf 10: prio 0 quantum 65536 rate 7968bit ceil 8Kbit {burst}\n"
        "class htb 1:20 parent 1:1 leaf 20: prio 1 quantum 65536 rate 24bit ceil 8Kbit burst 596b/1 cburst 64Kb/1\n"
    )
    queues = [replace(one, options={"limit": htb.MIN_QUEUE_BYTES}) for one in QUEUES]
    assert check(tiny, qdiscs=[ROOT, *queues], rate_bytes_per_s=1000, weights=(254, 1)).differences == ()


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


HIGH_FILTER = (
    f"filter del dev {DEVICE} parent 1: protocol ip prio 1\nfilter add dev {DEVICE} parent 1: protocol ip prio "
)
CATCH_ALL = (
    f"{HIGH_FILTER}1 u32 match u32 0 0 flowid 1:20\n"
    f"filter add dev {DEVICE} parent 1: protocol ip prio 4 u32 match ip tos 0xb8 0xfc flowid 1:10"
)
ELSEWHERE = (
    f"qdisc del dev {DEVICE} parent 1:20\nclass del dev {DEVICE} classid 1:20\n"
    f"class add dev {DEVICE} parent 1: classid 1:20 htb rate 10mbit ceil 1000mbit prio 1"
)
SMALL_TURNS = (
    f"class change dev {DEVICE} parent 1:1 classid 1:10 htb rate 990mbit ceil 1000mbit "
    "burst 1600 cburst 1600 quantum 1600 prio 0"
)


def tbf(leaf: int) -> str:
    place = f"dev {DEVICE} parent 1:{leaf}"
    return f"qdisc del {place}\nqdisc add {place} tbf rate 1mbit burst 10kb limit 100kb"


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("damage", "what", "found"),
    [
        (
            f"class change dev {DEVICE} parent 1: classid 1:1 htb rate 1000mbit ceil 10mbit burst 125000 cburst 125000",
            "ceiling of the link",
            "10,000,000 bit/s",
        ),
        (
            f"filter add dev {DEVICE} parent 1: protocol ip prio 3 u32 match ip tos 0x20 0xfc flowid 1:10",
            "another filter",
            "protocol ip u32 flowid 1:10 match 00200000/00fc0000 at 0",
        ),
        (CATCH_ALL, "another filter", "protocol ip u32 flowid 1:20 match 00000000/00000000 at 0"),
        (
            f"{HIGH_FILTER}1 u32 match ip dport 5000 0xffff match ip tos 0xb8 0xfc flowid 1:10",
            "ip filter of DSCP 46",
            "none",
        ),
        (f"{HIGH_FILTER}1 u32 match ip tos 0xb8 0xff flowid 1:10", "ip filter of DSCP 46", "none"),
        (ELSEWHERE, "parent of the low class (KV)", "1:"),
        (
            f"class add dev {DEVICE} parent 1:1 classid 1:30 htb rate 500mbit ceil 1000mbit prio 0",
            "class 1:30",
            "rate 500,000,000 bit/s under 1:1",
        ),
        (f"qdisc change dev {DEVICE} parent 1:10 handle 10: bfifo limit 1", "queue of the high class", "bfifo limit 1"),
        (tbf(10), "queue of the high class", "tbf rate 125000 burst 10240 lat 737280"),
        (tbf(20), "queue of the low class (KV)", "tbf rate 125000 burst 10240 lat 737280"),
        (SMALL_TURNS, "quantum of the high class", "1600"),
    ],
    ids=[
        "ceil",
        "kv-in-high",
        "catch-all",
        "dport",
        "mask",
        "parent",
        "third",
        "limit",
        "tbf-high",
        "tbf-low",
        "quantum",
    ],
)
def test_each_damage_on_a_real_kernel_is_found(space: str, damage: str, what: str, found: str) -> None:
    tc(space, "\n".join(htb.shaping(DEVICE, RATE, "classes")) + f"\n{damage}\n")
    checked = qos("check", "--rate", "125MB/s", inside=space)
    assert checked.returncode == 1
    assert re.search(
        rf"^{DEVICE}: {re.escape(what)}\n.*\n    found    {re.escape(found)}$", checked.stdout, re.MULTILINE
    )


def test_a_device_that_is_not_there_can_not_be_checked() -> None:
    with pytest.raises(FabricError, match=r"tc -j qdisc show dev nowhere0: Cannot find device .*; name one that"):
        check_linux("nowhere0")
