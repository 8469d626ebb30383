"""Runs grouped: cells, settings and what they are called; stages of their turns."""

import pytest
from result_documents import document, full
from result_documents import run as run_document
from result_records import result, run, turn

from dualpath.results import cells_of, comparisons
from dualpath.results.cells import settings_of
from dualpath.results.file import decode
from dualpath.results.turns import TTFT_STAGES, mean_stages_s


def test_a_cell_is_the_median_of_the_repeats_that_lost_nothing():
    jcts_s = ((5.0, 0), (9.0, 0), (7.0, 0), (1.0, 3))
    found = result(*(run(jct_s=jct_s, errors=errors, repeat=i) for i, (jct_s, errors) in enumerate(jcts_s)))
    (cell,) = cells_of(found)
    assert (cell.median.jct_s, len(cell.counted), len(cell.runs), len(cell.whole)) == (7.0, 3, 4, 3)
    assert (cell.jct.median, cell.jct.least, cell.jct.most) == (7.0, 5.0, 9.0)
    spread = cell.spread(lambda one: one.jct_s)
    assert (spread.median, spread.least, spread.most) == (7.0, 5.0, 9.0)
    assert cell.spread(lambda one: one.ratio_to_basic) is None


def test_of_two_repeats_the_faster_one_stands_for_both():
    (cell,) = cells_of(result(run(jct_s=9.0, repeat=0), run(jct_s=5.0, repeat=1)))
    assert (cell.median.repeat, cell.jct.median) == (1, 5.0)


def test_repeats_that_lost_turns_stand_for_nothing_unless_all_did():
    (cell,) = cells_of(result(run(jct_s=1.0, errors=1), run(jct_s=2.0, errors=1)))
    assert (cell.median.jct_s, len(cell.counted), cell.whole) == (1.0, 2, [])
    (one,) = comparisons([cell])
    assert one.complete("basic") is None and one.complete("oracle") is None and one.complete(None) is None


def test_settings_differ_in_topology_or_parameters():
    runs = [run(s, parameters={"agents": n}) for n in (4, 2) for s in ("oracle", "basic")]
    found = comparisons(cells_of(result(*runs, run("basic", topology="1P2D"))))
    assert [(one.setting.topology, one.setting.parameters, list(one.cells)) for one in found] == [
        ("1P1D", (("agents", 2),), ["oracle", "basic"]),
        ("1P1D", (("agents", 4),), ["oracle", "basic"]),
        ("1P2D", (), ["basic"]),
    ]


def test_rows_come_in_the_order_of_the_configuration():
    found = decode(full() | {"runs": full()["runs"][::-1]})
    assert [(cell.setting.topology, cell.system) for cell in cells_of(found)] == [
        (topology, system) for topology in ("1P1D", "1P2D") for system in ("basic", "dualpath", "oracle")
    ]


def test_a_label_says_what_varies_and_nothing_else():
    parameters = [{"agents": n, "append_tokens": 64, "probe": p, "kind": "x"} for n, p in ((2, 0), (4, 1))]
    found = result(*(run(parameters=one) for one in parameters))
    first, second = settings_of(found, source="monday")
    assert first.label == "monday 1P1D, 2 agents, probe 0" and second.label == "monday 1P1D, 4 agents, probe 1"
    assert second.label_without("agents") == "monday 1P1D, probe 1"


def test_a_rate_of_arrivals_is_a_parameter():
    found = decode(document(*(run_document("1P1D", "basic", 9.0, {}, agents_per_s=rate) for rate in (2.0, 0.5))))
    assert [cell.setting.label for cell in cells_of(found)] == ["1P1D, 0.5 agents a second", "1P1D, 2 agents a second"]


def test_stages_are_means_and_what_the_server_did_not_see():
    turns = [turn(0, ttft_s=1.0), turn(1, ttft_s=3.0, read_s=1.5)]
    stages = mean_stages_s(turns)
    assert tuple(stages) == TTFT_STAGES
    assert stages == pytest.approx({"scheduling": 0.1, "allocation": 0.0, "read": 1.0, "prefill": 0.2, "outside": 0.7})
    assert mean_stages_s([]) is None
