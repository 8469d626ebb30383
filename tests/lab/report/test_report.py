import io

from result_documents import document, full, run
from rich.console import Console

from dualpath.lab.report.run_table import terminal_table
from dualpath.lab.report.summary import explain
from dualpath.results.file import decode


def printed(result):
    console = Console(file=io.StringIO(), width=130)
    console.print(terminal_table(result))
    return console.file.getvalue().splitlines()


def test_a_row_shows_the_figures_of_its_run():
    lines = printed(decode(full()))
    (row,) = [line for line in lines if "1.85×" in line]
    assert row.split() == [
        *("dualpath", "27.0", "1.85×", "93%", "of", "2.00×", "2.70/5.40", "21/39", "12/19"),
        *("96.1%", "1.04", "1.46", "|", "1.36"),
    ]
    assert sum("oracle" in line for line in lines) == 2
    assert not any("failed" in line or ("of 2.75×" in line and "oracle" in line) for line in lines)
    assert lines[0].startswith(
        "12 agents, 60 turns, 180,000 prompt tokens (context up to 4,096); first contexts stored"
    )


def test_the_table_of_the_demo_fits_110_columns():
    assert Console(width=200).measure(terminal_table(decode(full()))).maximum <= 110


def test_repeats_show_their_range_and_failures_a_column():
    runs = [run("1P1D", "basic", jct_s, {"PE0": 10, "DE1": 0}, errors=2) for jct_s in (5.0, 7.0, 9.0)]
    lines = printed(decode(document(*runs)))
    (row,) = [line for line in lines if "basic" in line and "7.0" in line]
    assert "7.0 (5.0–9.0)" in row and row.split()[-1] == "2"
    assert any("failed" in line for line in lines)


def test_what_was_not_measured_is_a_dash():
    gone = dict.fromkeys(("ttft_p50_s", "ttft_p99_s", "ttst_p50_s", "tpot_p99_s"))
    lines = printed(decode(document(run("1P1D", "dualpath-rr", 5.0, {"PE0": 0, "DE1": 0}, **gone))))
    (row,) = [line for line in lines if "dualpath-rr" in line]
    assert row.split() == [*("1P1D", "dualpath-rr", "5.0", "–", "–/–", "–/39", "12/–", "96.1%", "–", "0", "|", "0")]


def test_sentences_say_what_bound_what_was_possible_and_what_was_lost():
    sentences = explain(decode(full()))
    bound = "1P1D: under basic the SNIC of PE0 received 2.82 GB, 47.0 s at its rate and 94% of the job's 50.0 s"
    assert sentences[0] == f"{bound}; it is what bounds the job."
    gained = "1P1D: dualpath is 1.85× basic, 93% of the most that pooling could give"
    assert sentences[1] == f"{gained} (2.00×, set by the number of storage NICs)."
    reads = "1P1D: of dualpath's 27.0 s, 23.5 s are the reads spread evenly over 2 SNICs, 0.8 s their imbalance"
    idle = "in 2.7 s the busiest SNIC waited for compute, decode or scheduling."
    assert sentences[2] == f"{reads} (max/avg 1.04), and {idle}"
    assert "set by compute: oracle, which pays nothing for I/O, takes 18.0 s" in sentences[4]
    assert sentences[6:] == ["Every system generated the same tokens in every turn."]


def test_a_system_that_generated_other_tokens_is_named():
    other = run("1P1D", "dualpath", 25.0, {"PE0": 5, "DE0": 5}, 50.0, 2.0, same_tokens_as_basic=0.875)
    sentences = explain(decode(document(other, snic_bytes_per_s=None)))
    assert sentences[-1] == "1P1D: dualpath generated basic's tokens in 87.5% of its turns."


def test_a_baseline_that_storage_does_not_bound_is_called_so():
    (sentence,) = explain(decode(document(run("1P1D", "basic", 100.0, {"PE0": 600_000_000, "DE1": 0}))))
    assert "10% of the job's 100.0 s; less than 80%, so storage reads alone do not bound the job." in sentence


def test_no_rate_means_no_account_of_it():
    runs = [
        run("1P1D", "basic", 50.0, {"PE0": 10, "DE0": 0}, 50.0, 2.0),
        run("1P1D", "dualpath", 25.0, {"PE0": 5, "DE0": 5}, 50.0, None),
    ]
    assert explain(decode(document(*runs, snic_bytes_per_s=None))) == [
        "1P1D: dualpath is 2.00× basic.",
        "Every system generated the same tokens in every turn.",
    ]


def test_a_run_that_lost_turns_is_not_explained_but_named():
    runs = [
        run("1P1D", "basic", 50.0, {"PE0": 2_820_000_000, "DE0": 0}, 50.0, 2.0),
        run("1P1D", "dualpath", 25.0, {"PE0": 5, "DE0": 5}, None, None, errors=3),
    ]
    bound, failed = explain(decode(document(*runs)))
    assert bound.startswith("1P1D: under basic the SNIC of PE0")
    assert failed == "3 turns failed: job completion times of the runs that lost turns are not comparable."
