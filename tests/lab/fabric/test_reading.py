"""Tools that are missing, refuse, or say something else; what smpquery and ibnetdiscover print."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualpath.lab.fabric import infiniband, reading
from dualpath.lab.fabric.findings import Comparison, FabricError, lines
from dualpath.lab.fabric.infiniband import Port, PortTables, kv_share, meant_tables

MEANT = meant_tables()
LANES = MEANT.sl2vl["0"]
VLARB = """\
# VLArbitration tables: Lid 2 port 3 LowCap 8 HighCap 8
# Low priority VL Arbitration Table:
VL    : |0x0 |0x1 |0x2 |0x3 |0x0 |0x0 |0x0 |0x0 |
WEIGHT: |0x0 |0x0 |0x40|0x0 |0x0 |0x0 |0x0 |0x0 |
# High priority VL Arbitration Table:
VL    : |0x0 |0x1 |0x2 |0x3 |0x0 |0x0 |0x0 |0x0 |
WEIGHT: |0xC0|0xC0|0x0 |0xC0|0x0 |0x0 |0x0 |0x0 |
"""
SL2VL = "ports: in  0, out  0: | 0| 1| 2| 3| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0|\n"
INFO = "VLCap:...........................VL0-7\nVLHighLimit:.....................99\n"


def tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "package"), [("smpquery", "infiniband-diags"), ("dcb", "iproute2"), ("tc", "iproute2")]
)
def test_a_missing_tool_is_named_with_its_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PATH", "/nowhere")
    with pytest.raises(FabricError, match=f"^there is no {name}: install {package}$"):
        reading.run(name)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("RTNETLINK answers: Operation not permitted", "run it as root"),
        ("can't open UMAD port ((null):0)", "this host has no InfiniBand device"),
        ("Attribute read: Operation not supported", "the driver of this device takes no DCB settings"),
    ],
)
def test_a_refusal_is_explained(said: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "dcb", f'echo "{said}" >&2; exit 2')
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/bin")
    with pytest.raises(FabricError, match=f"^dcb -N -j app show dev eth2: .*; {advice}"):
        reading.check_roce("eth2")


def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "tc", "exec sleep 60")
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(reading, "TIMEOUT_S", 0.2)
    with pytest.raises(FabricError, match=r"tc -j qdisc show dev eth0 did not end within 0\.2 s"):
        reading.check_linux("eth0")


ONE_PORT = "echo \"CA 5 1 0x07 4x SDR - SW 2 4 0x20 ( 'De1' - 'Sw1' )\""
ROW = "ports: in  0, out  0: | 0| 1| 2| 3| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0| 0|"
SMPQUERY = "case $1 in sl2vl) echo '{}';; portinfo) echo 'VLHighLimit:...99';; vlarb) printf '{}';; esac"


ODD_CLASS = """\
case "$*" in
    *qdisc*) echo '[{"kind":"htb","handle":"1:","root":true}]';;
    *class*) echo 'class htb 1:1 root rate xbit ceil 1bit burst 1b cburst 1b';;
esac"""


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("tc", "echo 'no JSON {'"),
        ("tc", "echo null"),
        ("tc", "echo '[1,2]'"),
        ("tc", r"printf '\377\376[]'"),
        ("tc", "head -c 200000 /dev/zero | tr '\\0' '['"),
        ("tc", 'echo "[{\\"kind\\":\\"htb\\",\\"handle\\":\\"1:\\",\\"root\\":true,\\"options\\":5}]"'),
        ("tc", ODD_CLASS),
        ("dcb", "echo nope"),
        ("dcb", "echo '[]'"),
        ("dcb", """echo '{"dscp_prio":[1,2],"prio_pfc":5,"prio_tc":"x","tc_tsa":null}'"""),
        ("dcb", """echo '{"dscp_prio":[[8,9]]}'"""),
        (
            "dcb",
            """echo '{"tc_tsa":["ets","ets","ets","ets","ets","ets","ets","ets","ets"],"tc_bw":[1,1,1,1,1,1,1,1]}'""",
        ),
        ("smpquery", "echo garbage"),
        ("smpquery", SMPQUERY.format(ROW.replace(" 2|", " x|"), "")),
        ("smpquery", SMPQUERY.format(ROW, "VL    : |0x0 |0x1 |\\n")),
        ("smpquery", SMPQUERY.format(ROW, "VL    : |zz |0x1 |\\nWEIGHT: |0x1|0x3|\\n")),
    ],
)
def test_output_that_is_not_a_tools_is_one_sentence(
    name: str, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, name, script)
    tool(tmp_path, "ibnetdiscover", ONE_PORT)
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/usr/bin:/bin")
    checks = {"tc": lambda: reading.check_linux("eth0"), "dcb": lambda: reading.check_roce("eth0")}
    with pytest.raises(FabricError, match=f"^{name} printed something else than expected") as said:
        checks.get(name, reading.check_infiniband)()
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"tc can't be run: Exec format error"),
        (b"\x7fELFgarbage", r"tc can't be run: Exec format error"),
        (b"#!/nowhere/sh\n", r"tc can't be run: No such file"),
        (b"#!/bin/sh\nhead -c 5000000 /dev/zero\n", r"printed 1,000,000 bytes or more"),
        (b"#!/bin/sh\nhead -c 900000 /dev/zero | tr '\\0' x >&2; exit 3\n", "^tc -j qdisc show dev eth0: x{400}…$"),
    ],
    ids=["empty", "binary", "interpreter", "endless", "long-complaint"],
)
def test_what_can_not_be_run_or_prints_without_end(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tc").write_bytes(content)
    (tmp_path / "tc").chmod(0o755)
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(reading, "MAX_BYTES", 1_000_000)
    with pytest.raises(FabricError, match=message):
        reading.check_linux("eth0")


def test_ports_that_there_was_no_time_for_are_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vlarb").write_text(VLARB)
    (tmp_path / "sl2vl").write_text(SL2VL)
    (tmp_path / "portinfo").write_text(INFO)
    tool(tmp_path, "smpquery", f'cat "{tmp_path}/$1"')
    tool(tmp_path, "ibnetdiscover", f"{ONE_PORT}; {ONE_PORT.replace('De1', 'De2').replace('CA 5', 'CA 6')}")
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv(reading.SIMULATOR_VARIABLE, raising=False)
    assert reading.check_infiniband().is_as_meant
    clock = iter([0.0, 1.0, 2 * reading.FABRIC_TIMEOUT_S])
    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    (found,) = reading.check_infiniband().differences
    assert (found.places, found.what) == (("De2 port 1",), "answer") and found.found.startswith("not asked")


def test_what_dcb_prints_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "app": '{"dscp_prio":[[8,1],[46,5]]}',
        "ets": '{"willing":false,"prio_tc":[0,1,0,0,0,2,2,2],"tc_bw":[1,1,98,0,0,0,0,0],'
        '"tc_tsa":["ets","ets","ets","strict","strict","strict","strict","strict"]}',
        "pfc": '{"prio_pfc":[false,true,false,false,false,true,false,false]}',
    }
    for part, answer in answers.items():
        (tmp_path / part).write_text(answer)
    tool(tmp_path, "dcb", f'cat "{tmp_path}/$3"')
    monkeypatch.setattr(reading, "_PATH", f"{tmp_path}:/bin")
    assert reading.check_roce("eth2").is_as_meant
    (tmp_path / "app").write_text("")  # what dcb prints of an empty table
    assert [one.found for one in reading.check_roce("eth2").differences] == ["none", "none"]


def test_an_options_file_that_is_no_text_is_refused() -> None:
    with pytest.raises(FabricError, match="can't be read: it is no text"):
        reading.check_infiniband(Path(sys.executable))


def test_ports_with_a_link_are_listed() -> None:
    text = (
        "CA     5  1 0x0000000000100007 4x SDR - SW     2  4 0x0000000000200000 ( 'De 1' - 'Sw1' )\n"
        "SW     2  8 0x0000000000200000 4x SDR                                    'Sw1'\n"
        "SW     2  4 0x0000000000200000 4x SDR - CA     5  1 0x0000000000100007 ( 'Sw1' - 'De 1' )\n"
    )
    assert reading.linked_ports(text) == [Port("De 1", 5, 1), Port("Sw1", 2, 4)]


def test_tables_of_a_port_are_read() -> None:
    assert reading.port_tables(VLARB, SL2VL, INFO, False) == MEANT
    assert reading.port_tables(VLARB, SL2VL, INFO, True).high_limit is None
    for damaged in ((VLARB, "", INFO), (VLARB, SL2VL, ""), (VLARB, "ports: in  0, out  0: | 0| 1|\n", INFO)):
        with pytest.raises(FabricError, match="not a port's tables"):
            reading.port_tables(*damaged, False)


def test_an_options_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FabricError, match=r"nothing\.conf can't be read: No such file"):
        reading.check_infiniband(tmp_path / "nothing.conf")


def test_a_ports_high_limit_is_compared_where_it_can_be_read() -> None:
    wrong = PortTables(0, MEANT.high, MEANT.low, MEANT.sl2vl)
    (found,) = infiniband.check({Port("Pe0", 1, 1): wrong, Port("Pe1", 2, 1): MEANT}).differences
    assert (found.places, found.what) == (("Pe0 port 1",), "high limit (× 4 KiB)")
    assert found.follows == "KV has 50.00% of a link that model messages fill, instead of 1.00%"


def test_arithmetic_of_the_shares() -> None:
    assert kv_share(MEANT, LANES) == pytest.approx(0.01)
    everywhere = {0: 192, 1: 192, 3: 192}
    papers = PortTables(240, everywhere, everywhere | {2: 64}, {"0": LANES})
    assert kv_share(papers, LANES) == pytest.approx(64 / (192 + 64) / 241)
    assert kv_share(PortTables(255, MEANT.high, MEANT.low, MEANT.sl2vl), LANES) == 0
    assert kv_share(PortTables(99, {}, MEANT.low, MEANT.sl2vl), LANES) == 1
    assert kv_share(PortTables(99, {}, {}, MEANT.sl2vl), LANES) == 0


@pytest.mark.parametrize("weights", [(99, 1), (9, 1), (1, 1), (500, 1)])
def test_other_weights_are_rendered_and_kept(weights: tuple[int, int]) -> None:
    meant = meant_tables(weights)
    assert kv_share(meant, LANES) == pytest.approx(max(weights[1] / sum(weights), 1 / 255))
    assert infiniband.check(
        {Port("Pe0", 1, 1): meant}, infiniband.render(weights)["opensm-qos.conf"], weights
    ).is_as_meant


@pytest.mark.parametrize(
    ("lane", "follows"),
    [
        (15, "the port drops what is sent on 7"),
        (2, "what is sent on 7 queues with KV"),
        (1, "no effect on the two classes"),
    ],
)
def test_service_levels_that_are_not_ours_are_looked_at_too(lane: int, follows: str) -> None:
    moved = PortTables(99, MEANT.high, MEANT.low, {"0": (*LANES[:7], lane, *LANES[8:])})
    (found,) = infiniband.check({Port("Pe0", 1, 1): moved}).differences
    assert found.follows == follows


@pytest.mark.parametrize("guid", ["0x1 : 0", "0x0", "0xffffffffffffffff"])
def test_what_is_no_guid_is_refused(guid: str) -> None:
    with pytest.raises(FabricError, match=f"'{guid}' is not the GUID of a port"):
        infiniband.render(storage_guids=["0x98039b0300a1b2c3", guid])


def test_weights_that_a_high_limit_can_not_keep_are_said() -> None:
    note = "3:2 can't be kept here: KV has 33.33% of a link that model messages fill, not 40.00%"
    assert infiniband.notes((3, 2)) == (note,)
    assert infiniband.render((3, 2))["opensm-qos.conf"].startswith(f"# {note}\n")
    assert infiniband.notes((99, 1)) == infiniband.notes((1, 1)) == ()


def test_alike_differences_are_one_and_every_line_says_what_follows() -> None:
    left_out = PortTables(99, {0: 4}, {1: 4, 2: 4}, {"1": LANES, "2": LANES})
    report = infiniband.check({Port("Sw1", 2, n): left_out for n in range(1, 7)} | {Port("Pe0", 1, 1): MEANT})
    shown = lines(report)
    assert shown[0] == "Sw1 port 1, Sw1 port 2, Sw1 port 3, Sw1 port 4 and 2 more: high table, lane:weight"
    assert shown[1:4] == [
        "    meant    0:192,1:192,3:192",
        "    found    0:4",
        "    so       KV still has 1.00% of a link that model messages fill: no effect on the shares",
    ]
    assert shown[-1].startswith("infiniband: 2 differences; ") and shown[-1].endswith("values compared at 7 places")
    comparison = Comparison()
    comparison.compare("a", "what", 1, 1, "nothing")
    assert comparison.differences() == () and comparison.compared == 1
