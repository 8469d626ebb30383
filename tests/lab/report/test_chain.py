import msgspec
import pytest
from result_records import result, run, turn

from dualpath.lab.report.chain import longest_chain
from dualpath.lab.report.summary import explain

TURNS = [
    turn(0, start_s=0.0, loaded_tokens=1000, read_s=4.0, prefill_s=0.5),  # latency 1.3 s, of it 0.3 s decode
    turn(0, start_s=3.3, loaded_tokens=1000, read_s=5.0, prefill_s=0.5),
    turn(1, start_s=0.0, loaded_tokens=2000, read_s=3.0, prefill_s=0.1),
]


def test_the_longest_chain_has_its_reads_with_every_nic_to_itself() -> None:
    """4,000 tokens are 40 MB; two NICs of 1 MB/s take 5 ms a token."""
    received = {"PE0": 20_000_000, "DE0": 20_000_000}
    chain = longest_chain(run("dualpath", turn_results=TURNS, snic_bytes=received), 1_000_000)
    assert chain is not None and chain.trajectory == "agent-0000"
    figures = (chain.decode_s, chain.prefill_s, chain.reads_alone_s, chain.reads_s, chain.pauses_s)
    assert figures == pytest.approx((0.6, 1.0, 10.0, 9.0, 2.0))
    assert chain.total_s == pytest.approx(13.6)


def test_only_nics_that_the_system_may_read_with_count() -> None:
    chain = longest_chain(run("basic", turn_results=TURNS, snic_bytes={"PE0": 40_000_000, "DE0": 0}), 1_000_000)
    assert chain is not None and chain.reads_alone_s == pytest.approx(20.0)


@pytest.mark.parametrize(
    "turns",
    [[], [msgspec.structs.replace(TURNS[0], timings=None)], [msgspec.structs.replace(TURNS[0], loaded_tokens=0)]],
)
def test_without_timed_turns_or_reads_there_is_none(turns: list[object]) -> None:
    assert longest_chain(run("dualpath", turn_results=turns), 1_000_000) is None


def test_a_summary_names_it() -> None:
    compared = run("dualpath", ratio_to_basic=1.5, turn_results=TURNS)
    (told,) = [said for said in explain(result(run(), compared)) if "longest chain" in said]
    assert told == (
        "1P1D: dualpath can't end before its longest chain of one agent (agent-0000), 4.8 s: 0.6 s decode, 1.0 s "
        "prefill, 1.2 s reads with every SNIC to itself (9.0 s as they were), 2.0 s pauses."
    )
