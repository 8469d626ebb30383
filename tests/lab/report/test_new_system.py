"""Systems that another package adds stand in tables, sentences, figures and pages by what they are."""

import matplotlib as mpl
import pytest
from result_records import result, run
from rich.console import Console

from dualpath.core.policy import Policy
from dualpath.core.systems import SYSTEMS, System
from dualpath.lab.experiments import findings
from dualpath.lab.experiments.catalog import EXPERIMENTS
from dualpath.lab.report.html import render
from dualpath.lab.report.run_table import terminal_table
from dualpath.lab.report.summary import explain
from dualpath.results.build import compared


@pytest.fixture
def found(monkeypatch):
    """Basic, a contender that reads with decode nodes alone, and a bound whose I/O is free; neither is ours."""
    ours = {"mine": Policy(read_path="de_only"), "their-bound": Policy(free_io=True)}
    for (name, policy), colour in zip(ours.items(), ("#123456", "#654321"), strict=True):
        monkeypatch.setitem(SYSTEMS._known, name, System(name=name, summary="", policy=policy, colour=colour))
    times_s = {"basic": 40.0, "mine": 20.0, "their-bound": 10.0}
    runs = [
        run(system, jct_s + rate, "1P2D", repeat=0, parameters={"append_tokens": rate}, ideal_ratio=None)
        for rate in (1.0, 2.0)
        for system, jct_s in times_s.items()
    ]
    return result(*compared(runs))


def test_ratios_are_to_the_bound_and_balance_is_over_the_readers(found):
    _, mine, bound = found.runs[:3]
    assert (mine.ratio_to_basic, mine.ideal_ratio) == (41 / 21, 3.0) and mine.ratio_to_ideal == 41 / 21 / 3
    assert bound.ratio_to_ideal is None and bound.ratio_to_basic == 41 / 11


def test_the_contender_is_set_off_in_the_table(found):
    console = Console(width=200, record=True, force_terminal=True)
    console.print(terminal_table(found))
    bold = [line for line in console.export_text(styles=True).splitlines() if "\x1b[1m" in line and "mine" in line]
    assert len(bold) == 2 and all("65% of 3.00×" in line or "64% of 3.00×" in line for line in bold)


def test_sentences_are_about_it(found):
    told = " ".join(explain(found))
    assert "mine is 1.95× basic, 65% of the most that pooling could give (3.00×" in told
    assert "of mine's 21.0 s" in told and "2 SNICs" in told and "dualpath" not in told
    verdict = findings.real_sessions(found)[0]
    assert "storage binds (ideal 3.00×); mine is 1.95× basic, 65% of the ideal" in verdict
    assert [match.nics for match in findings.nic_matches(found)] == [1, 2]
    assert any("mine changes basic's time by" in sentence for sentence in findings.ablation(found))


# Not those that need arrivals, or two prefill engines.
DRAWN = [one for one in EXPERIMENTS if one.name not in ("aps", "attention-balance")]


@pytest.mark.parametrize("one", DRAWN, ids=lambda one: one.name)
def test_figures_have_its_colour_and_name(found, one, tmp_path):
    with mpl.rc_context({"svg.fonttype": "none"}):
        one.draw(found, tmp_path / "figure.svg")
    svg = (tmp_path / "figure.svg").read_text()
    assert "mine" in svg and (one.figure == "latencies.draw_stages" or "#123456" in svg)
    assert ("mine's ideal" in svg) == one.figure.startswith("bars.")


def test_the_page_has_its_card_and_its_ideal(found):
    page = render([found])
    assert "1P2D: mine over basic" in page and "#123456" in page
    assert "mine gains most over basic at 1P2D, 1 tokens appended a turn" in page
