"""Result files read: cells, balances, stages, findings, tables, figures and the page."""

import itertools

import msgspec
import pytest
from experiment_results import result, run, turn
from rich.console import Console

from dualpath.lab.experiments import findings
from dualpath.lab.experiments.balance import attention_balance, snic_balance
from dualpath.lab.experiments.catalog import EXPERIMENTS, definition
from dualpath.lab.experiments.page import write_figure, write_page
from dualpath.lab.experiments.stages import STAGES, mean_stages_s
from dualpath.lab.experiments.tables import markdown_table, terminal_table
from dualpath.results.cells import cells, measured_points
from dualpath.results.file import SnicSample
from dualpath.spec.cluster_setup import ClusterSetup


def compared(jct_s, topology="1P1D", system="dualpath", ratio=2.0, ideal=2.0, **more):
    return run(system, jct_s, topology, ratio_to_basic=ratio, ideal_ratio=ideal, ratio_to_ideal=ratio / ideal, **more)


def test_a_cell_is_the_median_of_the_repeats_that_lost_nothing():
    jcts_s = ((5.0, 0), (9.0, 0), (7.0, 0), (1.0, 3))
    found = result(*(run(jct_s=jct_s, errors=errors, repeat=i) for i, (jct_s, errors) in enumerate(jcts_s)))
    (cell,) = cells(found)
    assert (cell.run.jct_s, len(cell.runs), cell.complete) == (7.0, 3, True)
    spread = cell.spread(lambda one: one.jct_s)
    assert (spread.median, spread.least, spread.most) == (7.0, 5.0, 9.0)
    assert cell.spread(lambda one: one.ratio_to_basic) is None
    (lost,) = cells(result(run(errors=2)))
    assert not lost.complete and measured_points(result(run(errors=2)))[0].complete("basic") is None


def test_points_differ_in_topology_or_parameters():
    runs = [run(s, parameters={"agents": n}) for n in (2, 4) for s in ("basic", "oracle")]
    points = measured_points(result(*runs, run(topology="1P2D")))
    assert [(p.topology, p.parameters, list(p.cells)) for p in points] == [
        ("1P1D", {"agents": 2}, ["basic", "oracle"]),
        ("1P1D", {"agents": 4}, ["basic", "oracle"]),
        ("1P2D", {}, ["basic"]),
    ]


def test_snic_balance_is_window_by_window_where_totals_are_even():
    """Two NICs take turns at being idle: even in total, as uneven as can be at any time."""
    samples = [
        SnicSample(2.0, {"PE0": 100, "DE0": 0}),
        SnicSample(4.0, {"PE0": 100, "DE0": 100}),
        SnicSample(6.0, {"PE0": 150, "DE0": 150}),
        SnicSample(8.0, {"PE0": 151, "DE0": 150}),
    ]
    balance = snic_balance(run("dualpath", snic_samples=samples), window_s=2.0)
    assert balance.ends_s == [2.0, 4.0, 6.0]  # the last window has next to nothing
    assert balance.max_over_avg == [2.0, 2.0, 1.0]
    assert balance.overall == pytest.approx((100 + 100 + 50) / (50 + 50 + 50))
    assert snic_balance(run("basic", snic_samples=samples), window_s=2.0).overall == 1.0  # one side reads
    assert snic_balance(run("dualpath", snic_samples=samples[:1])) is None


def test_attention_counts_new_tokens_times_what_they_attend_to():
    shared = {"prompt_tokens": 200, "loaded_tokens": 100, "prefill_s": 2.0, "ttft_s": 2.0}
    turns = [turn(0, prefill_engine="PE0", **shared), turn(1, prefill_engine="PE1", **shared)]
    even = run("dualpath", topology="2P1D", turn_results=turns)
    assert attention_balance(even, window_s=2.0).max_over_avg == [1.0]
    # 100 new tokens after 700 are 100 × 750 pairs, five times 100 × 150.
    longer = turn(1, prefill_engine="PE1", **(shared | {"prompt_tokens": 800, "loaded_tokens": 700}))
    uneven = run("dualpath", topology="2P1D", turn_results=[turns[0], longer])
    assert attention_balance(uneven, window_s=2.0).max_over_avg == [pytest.approx(2 * 5 / 6)]
    assert attention_balance(run("dualpath")) is None  # one PE
    untold = [msgspec.structs.replace(one, timings=None) for one in turns]
    assert attention_balance(run("dualpath", topology="2P1D", turn_results=untold)) is None


def test_stages_are_means_and_what_the_server_did_not_see():
    turns = [turn(0, ttft_s=1.0), turn(1, ttft_s=3.0, read_s=1.5)]
    stages = mean_stages_s([run(turn_results=turns)])
    assert tuple(stages) == STAGES
    assert stages == pytest.approx({"scheduling": 0.1, "allocation": 0.0, "read": 1.0, "prefill": 0.2, "outside": 0.7})
    assert mean_stages_s([run(turn_results=[])]) is None


def test_pairs_of_equal_storage_bandwidth():
    found = result(
        *(run("basic", 20.0, "1P1D"), compared(10.4, "1P1D")),
        *(run("basic", 10.0, "2P1D"), compared(7.0, "2P1D")),
        *(run("basic", 20.2, "1P2D"), compared(9.0, "1P2D")),
    )
    pairs = findings.equal_bandwidth_pairs(found)
    assert [(pair.first, pair.second, pair.nics, pair.ties) for pair in pairs] == [
        ("basic 1P1D", "basic 1P2D", 1, True),
        ("dualpath 1P1D", "basic 2P1D", 2, True),
        ("dualpath 2P1D", "dualpath 1P2D", 3, False),
    ]
    assert pairs[1].jct_ratio == pytest.approx(1.04)
    sentences = findings.pairs(found)
    assert sentences[0] == ("basic 1P1D and basic 1P2D, both reading with 1 storage NIC: JCT ratio 0.99; they tie.")
    assert sentences[2].endswith("no tie: more than 10% apart.")


@pytest.mark.parametrize(
    ("ratio", "ideal", "expected"),
    [
        (1.9, 2.0, "storage binds (ideal 2.00×); dualpath is 1.90× basic, 95% of the ideal: at least 90% holds"),
        (1.6, 2.0, "80% of the ideal: at least 90% missed"),
        (0.99, 1.05, "storage does not bind (ideal 1.05×); dualpath is 0.99× basic: at least 0.98× holds"),
        (0.9, 1.05, "at least 0.98× missed"),
    ],
)
def test_real_sessions_are_judged_by_whether_storage_binds(ratio, ideal, expected):
    both = run("basic", 20.0), compared(20.0 / ratio, ratio=ratio, ideal=ideal)
    assert expected in findings.real_sessions(result(*both, run("oracle", 5.0)))[0]
    assert "without an oracle nobody knows" in findings.real_sessions(result(*both))[0]


def test_pairs_are_told_of_points_where_storage_binds():
    ideals = {"1P1D": 2.0, "1P2D": 3.0, "2P1D": 1.05}
    runs = [
        [run("basic", 20.0, nodes), compared(10.0, nodes, ideal=ideal), run("oracle", 5.0, nodes)]
        for nodes, ideal in ideals.items()
    ]
    sentences = findings.real_sessions(result(*itertools.chain(*runs)))
    told = [sentence for sentence in sentences if "JCT ratio" in sentence]
    assert len(told) == 1  # not dualpath 1P1D with basic 2P1D, not dualpath 1P2D with dualpath 2P1D
    assert told[0].startswith("basic 1P1D and basic 1P2D")


def test_the_agent_that_reads_most_bounds_every_system():
    setup = ClusterSetup(
        layers=1,
        kv_bytes_per_token=10**5,
        snic_bytes_per_s=None,
        cnic_bytes_per_s=None,
        compute_quota_s=0.3,
        threads=1,
        cores=2,
        dtype="float32",
        transport="shm",
    )
    turns = [turn(0, loaded_tokens=100), turn(0, loaded_tokens=300), turn(1, loaded_tokens=200)]
    found = findings.longest_agent(result(run(errors=1), run(cluster=setup, turn_results=turns)))
    assert len(found) == 1
    assert found[0].startswith("agent-0000 reads 40 of 60 MB, one turn after another: 1.0 s with one NIC")
    assert findings.longest_agent(result(run(turn_results=turns))) == []  # whose KV has an unknown size


def test_an_ablation_is_told_with_the_papers_figures():
    runs = [run("basic", 20.0, ratio_to_basic=1.0), compared(12.0, ratio=20 / 12)]
    sentences = findings.ablation(result(*runs))
    assert sentences == ["1P1D: dualpath changes basic's time by -40.0 % (paper, DS 660B at 64K: -45.6 %)."]


def test_lost_turns_and_other_tokens_are_told():
    runs = [run(), compared(5.0, same_tokens_as_basic=0.75), compared(5.0, errors=3, same_tokens_as_basic=1.0)]
    told = findings.soundness(result(*runs))
    assert told[0].startswith("3 turns failed")
    assert told[1] == "Generated tokens differ from basic's: in the worst run 75.0% of turns agree."
    agreed = findings.soundness(result(compared(5.0, same_tokens_as_basic=1.0)))
    assert agreed == ["Every system generated the same tokens in every turn."]


def sample_result(one):
    """What the experiment could have measured."""
    axes = {name: values[:2] for name, values in one.load.axes.items()}
    combinations = [{}]
    for name, values in axes.items():
        combinations = [known | {name: value} for known in combinations for value in values]
    runs = []
    for parameters in combinations:
        for topology in one.load.topologies:
            for system in one.load.systems:
                jct_s = 20.0 if system == "basic" else 11.0
                more = {"parameters": parameters, "ratio_to_basic": 20.0 / jct_s, "ideal_ratio": 2.0}
                engines = [f"PE{i}" for i in range(int(topology[0]))]
                turns = [turn(i, start_s=i, prefill_engine=engines[i % len(engines)]) for i in range(8)]
                runs.append(run(system, jct_s, topology, ratio_to_ideal=10.0 / jct_s, turn_results=turns, **more))
    return result(*runs, name=one.name)


@pytest.mark.parametrize("one", EXPERIMENTS, ids=lambda one: one.name)
def test_every_experiment_draws_finds_and_tabulates(one, tmp_path):
    found = sample_result(one)
    path = write_figure(one, found, tmp_path)
    assert path.name == f"{one.name}.png" and path.stat().st_size > 10_000
    assert one.find(found)
    headings, line, *rows = markdown_table(found).splitlines()
    assert len(rows) == len(found.runs)
    assert {row.count(" | ") for row in (headings, line, *rows)} == {headings.count(" | ")}
    console = Console(width=200, record=True)
    console.print(terminal_table(found))
    shown = console.export_text()
    assert all(system in shown for system in one.load.systems)


def test_a_figure_of_nothing_is_refused_and_leaves_no_file(tmp_path):
    for name in ("aps", "agents-context", "ttft-breakdown", "snic-balance", "attention-balance"):
        with pytest.raises(ValueError, match="nothing to draw"):
            write_figure(definition(name), result(run("dualpath", turn_results=[], snic_samples=[])), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_lost_turns_are_hatched_not_measured(tmp_path):
    runs = [run("basic", 20.0, "1P2D", ratio_to_basic=1.0), run("dualpath", 3.0, "1P2D", errors=2)]
    assert write_figure(definition("ablation"), result(*runs), tmp_path).exists()
    assert "2 |" in markdown_table(result(*runs)).splitlines()[-1][-4:]


def test_the_page_has_what_was_run_in_the_catalogs_order(tmp_path):
    for name in ("snic-balance", "pd-ratio"):
        one = definition(name)
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(sample_result(one)))
    write_figure(definition("pd-ratio"), sample_result(definition("pd-ratio")), tmp_path)
    (tmp_path / "ablation.json").write_text("{")
    text = write_page(tmp_path).read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [heading.split(":")[0] for heading in headings] == ["## pd-ratio", "## snic-balance"]
    assert text.count("](pd-ratio.png)") == 1 and "](snic-balance.png)" not in text
    assert "storage NICs at 40 MB/s; 2 cores. `dualpath experiment pd-ratio`" in text
