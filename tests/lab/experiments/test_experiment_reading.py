"""Result files read: findings, tables, figures and the page."""

import itertools
import struct

import matplotlib as mpl
import msgspec
import pytest
from result_documents import document, full
from result_documents import run as run_document
from result_records import result, run, turn
from rich.console import Console

from dualpath.lab.experiments import findings
from dualpath.lab.experiments.catalog import EXPERIMENTS, definition
from dualpath.lab.experiments.figures.bars import draw_traffic
from dualpath.lab.experiments.readme import write_page
from dualpath.lab.report.run_table import markdown_table, terminal_table
from dualpath.results.file import decode
from dualpath.spec.cluster_setup import ClusterSetup


def compared(jct_s, topology="1P1D", system="dualpath", ratio=2.0, ideal=2.0, **more):
    return run(system, jct_s, topology, ratio_to_basic=ratio, ideal_ratio=ideal, ratio_to_ideal=ratio / ideal, **more)


def test_pairs_of_equal_storage_bandwidth():
    found = result(
        *(run("basic", 20.0, "1P1D"), compared(10.4, "1P1D")),
        *(run("basic", 10.0, "2P1D"), compared(7.0, "2P1D")),
        *(run("basic", 20.2, "1P2D"), compared(9.0, "1P2D")),
    )
    pairs = findings.nic_matches(found)
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
    assert "without an oracle the ideal is not known" in findings.real_sessions(result(*both))[0]


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


def sample_result(one):
    """What the experiment could have measured."""
    axes = {name: values[:2] for name, values in one.conditions.axes.items()}
    combinations = [{}]
    for name, values in axes.items():
        combinations = [known | {name: value} for known in combinations for value in values]
    runs = []
    for parameters in combinations:
        for topology in one.conditions.topologies:
            for system in one.conditions.systems:
                jct_s = 20.0 if system == "basic" else 11.0
                more = {"parameters": parameters, "ratio_to_basic": 20.0 / jct_s, "ideal_ratio": 2.0}
                engines = [f"PE{i}" for i in range(int(topology[0]))]
                turns = [turn(i, start_s=i, prefill_engine=engines[i % len(engines)]) for i in range(8)]
                runs.append(run(system, jct_s, topology, ratio_to_ideal=10.0 / jct_s, turn_results=turns, **more))
    return result(*runs, name=one.name)


@pytest.mark.parametrize("one", EXPERIMENTS, ids=lambda one: one.name)
def test_every_experiment_draws_finds_and_tabulates(one, tmp_path):
    found = sample_result(one)
    path = tmp_path / "figure.png"
    one.draw(found, path)
    assert path.stat().st_size > 10_000
    assert one.find(found)
    headings, line, *rows = markdown_table(found).splitlines()
    assert len(rows) == len(found.runs)
    assert {row.count(" | ") for row in (headings, line, *rows)} == {headings.count(" | ")}
    console = Console(width=200, record=True)
    console.print(terminal_table(found))
    shown = console.export_text()
    assert all(system in shown for system in one.conditions.systems)


def test_a_figure_of_nothing_is_refused_and_leaves_no_file(tmp_path):
    for name in ("aps", "agents-context", "ttft-breakdown", "snic-balance", "attention-balance"):
        with pytest.raises(ValueError, match="nothing to draw"):
            bare = result(run("dualpath", turn_results=[], snic_samples=[]))
            definition(name).draw(bare, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_lost_turns_are_hatched_not_measured(tmp_path):
    runs = [run("basic", 20.0, "1P2D", ratio_to_basic=1.0), run("dualpath", 3.0, "1P2D", errors=2)]
    definition("ablation").draw(result(*runs), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
    assert "2 |" in markdown_table(result(*runs)).splitlines()[-1][-4:]


def test_the_page_has_what_was_run_in_the_catalogs_order(tmp_path):
    for name in ("snic-balance", "pd-ratio"):
        one = definition(name)
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(sample_result(one)))
    definition("pd-ratio").draw(sample_result(definition("pd-ratio")), tmp_path / "pd-ratio.png")
    (tmp_path / "ablation.json").write_text("{")
    text = write_page(tmp_path).read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [heading.split(":")[0] for heading in headings] == ["## pd-ratio", "## snic-balance"]
    assert text.count("](pd-ratio.png)") == 1 and "](snic-balance.png)" not in text
    assert "storage NICs at 40 MB/s; 2 cores. `dualpath experiment pd-ratio`" in text


def test_the_demos_figure_is_a_png_of_readme_width(tmp_path):
    draw_traffic(decode(full()), tmp_path / "demo.png")
    png = (tmp_path / "demo.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", png[16:20]) == (1800,)


@pytest.mark.parametrize(
    ("result", "texts", "absent"),
    [
        (
            full(),
            ["1.85×", "2.48×", "27.0 s", "max/avg", "1.04", "1P1D", "1P2D", "PE0", "DE1", "2.82", "dualpath's ideal"],
            ["1.00×"],
        ),
        (
            document(run_document("2P1D", "basic-layerwise", 5.0, {})),
            ["5.0 s", "2P1D", "basic-layerwise"],
            ["max/avg", "ideal"],
        ),
        (document(run_document("1P1D", "oracle", 5.0, {"DE0": 9}, errors=55)), ["55 turns", "lost"], ["5.0 s"]),
        (
            document(*[run_document("1P1D", "unheard-of", jct_s, {"PE0": 0}) for jct_s in (3.0, 4.0, 5.0)]),
            ["4.0 s", "unheard-of"],
            ["×"],
        ),
    ],
)
def test_the_demos_figure_says_what_the_file_says(tmp_path, result, texts, absent):
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw_traffic(decode(result), tmp_path / "demo.svg")
    svg = (tmp_path / "demo.svg").read_text()
    assert [text for text in texts if f">{text}<" not in svg] == []
    assert [text for text in absent if f"{text}<" in svg] == []


def test_no_runs_are_no_figure(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        draw_traffic(decode(document()), tmp_path / "demo.png")
