import base64
import gzip
import json
import re
import statistics
from pathlib import Path

import msgspec
import pytest
from result_documents import document, full, run
from synthetic_results import RATE, synthetic

from dualpath.cli import main
from dualpath.lab.report.html import render, write_report
from dualpath.results import ResultFileError
from dualpath.results.file import decode

ROOT = Path(__file__).parents[3]


def packed(page, name="document"):
    text = re.search(rf'<script type="text/plain" id="packed-{name}">([^<]*)</script>', page).group(1)
    return gzip.decompress(base64.b64decode(text))


def words(page):
    """The page's own HTML, without what is packed."""
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)


def cards(page):
    """Title, figure and caption of each card."""
    return re.findall(r'<h2>([^<]*)</h2>\s*<p class="figure">([^<]*)</p>\s*<p class="caption">([^<]*)<', page)


@pytest.fixture(scope="module")
def result():
    return synthetic(repeats=3)


def test_a_card_for_each_topology_has_the_median_ratio_and_the_spread_of_the_repeats(result):
    found = cards(render([result]))
    assert [title for title, _, _ in found] == ["1P1D: dualpath over basic", "1P2D: dualpath over basic"]
    for topology, (_, figure, caption) in zip(("1P1D", "1P2D"), found, strict=True):
        runs = [run for run in result.runs if (run.topology, run.system) == (topology, "dualpath")]
        median, low, high = (sorted(run.ratio_to_basic for run in runs)[at] for at in (1, 0, 2))
        assert (figure, caption) == (f"{median:.2f}×", f"median of 3 runs, {low:.2f}× to {high:.2f}×")


def test_without_basic_a_card_shows_the_time():
    alone = decode(document(run("1P1D", "oracle", 12.34, {"PE0": 5, "DE0": 5})))
    assert cards(render([alone])) == [("1P1D: JCT of oracle", "12.3 s", "a single run")]


def test_agents_that_arrive_at_a_rate_are_judged_by_their_first_tokens():
    open_loop = synthetic(topologies=("1P1D",), agents=4)
    runs = [msgspec.structs.replace(run, agents_per_s=0.5) for run in open_loop.runs]
    page = render([msgspec.structs.replace(open_loop, runs=runs)])
    basic_s, dualpath_s = (statistics.mean(turn.ttft_s for turn in run.turn_results) for run in runs[:2])
    ((title, figure, _),) = cards(page)
    assert title.replace("&#39;", "'") == "1P1D: basic's mean TTFT over dualpath's"
    assert figure == f"{basic_s / dualpath_s:.2f}×"
    assert "Agents arrive at a given rate: compare latencies" in page


def test_a_sweep_is_summed_up_by_its_range(result):
    swept = synthetic(topologies=("1P1D",), points=({"agents": 2}, {"agents": 6}))
    ratios = [run.ratio_to_basic for run in swept.runs if run.system == "dualpath"]
    page = render([swept])
    ((_, figure, caption),) = cards(page)
    assert figure == f"{min(ratios):.2f} – {max(ratios):.2f}×" and caption == "over 2 settings"
    assert f"at 1P1D, 6 agents ({max(ratios):.2f}×), least at 1P1D, 2 agents ({min(ratios):.2f}×)" in page


def test_nothing_in_the_page_points_elsewhere(result):
    page = render([result])
    assert "default-src 'none'" in page
    assert not re.findall(r"https?://", words(page))
    ours = "".join(re.findall(r"<(?:script|style)>(.*?)</(?:script|style)>", page, flags=re.S))
    assert "class Timeline" in ours and not re.findall(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", ours)
    assert b"plotly.js" in packed(page, "plotly")[:200]


def test_the_same_results_give_the_same_page(result):
    assert render([result]) == render([result])


def test_text_of_a_result_file_is_escaped():
    page = render([synthetic(failures=1, name="<script>alert(1)</script>")])
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "503 &lt;b&gt;engine lost&lt;/b&gt;" in page


def test_every_turn_is_in_the_document_with_its_stages(result):
    turns = json.loads(packed(render([result])))["turns"]["runs"]
    assert [one["run"] for one in turns] == list(range(len(result.runs)))
    columns = turns[1]["columns"]
    assert {len(column) for column in columns.values()} == {60}
    first = min(result.runs[1].turn_results, key=lambda turn: turn.start_s)
    stages = ("outside", "scheduling", "allocation", "read", "prefill")
    assert sum(columns[stage][0] for stage in stages) == pytest.approx(first.ttft_s * 1e3, abs=0.3)
    assert columns["ttft"][0] + columns["decode"][0] == pytest.approx(first.latency_s * 1e3, abs=0.3)
    assert turns[1]["agents"][columns["agent"][0]] == first.trajectory
    assert turns[1]["engines"][columns["pe"][0]] == first.timings.prefill_engine


def test_of_too_many_turns_whole_agents_are_left_out_alike_and_the_page_says_so(result):
    page = render([result], at_most=400)
    turns = json.loads(packed(page))["turns"]["runs"]
    kept = {tuple(sorted(one["agents"])) for one in turns}
    assert len(kept) == 1 and len(next(iter(kept))) == 4
    assert {len(one["columns"]["round"]) for one in turns} == {20}
    assert "hold 360 of 1,080 turns" in page
    assert "turns: whole agents" not in render([result], at_most=1080)


def test_a_prediction_stands_beside_its_measurement_with_its_error(result):
    shifted = [
        msgspec.structs.replace(
            run,
            jct_s=run.jct_s * (0.9 if run.system == "basic" else 1.05),
            turn_results=[msgspec.structs.replace(turn, ttft_s=turn.ttft_s * 1.2) for turn in run.turn_results],
        )
        for run in result.runs
    ]
    predicted = msgspec.structs.replace(result, kind="prediction", runs=shifted, command="dualpath simulate --like")
    page = render([result], predicted)
    assert "off by 6.7% in the mean and 10.0% at most, mean times to first token by 20.0% in the mean" in page
    (section,) = [one for one in json.loads(packed(page))["sections"] if one["id"] == "prediction"]
    rows = section["charts"][0]["variants"][0]["rows"]
    assert [(row[0], row[1], row[4]) for row in rows[:3]] == [
        ("1P1D", "basic", "-10.0%"),
        ("1P1D", "dualpath", "+5.0%"),
        ("1P1D", "oracle", "+5.0%"),
    ]
    assert "dualpath simulate --like" in page


def test_a_prediction_of_something_else_is_refused(result):
    other = synthetic(topologies=("4P1D",), kind="prediction", name="other")
    with pytest.raises(ResultFileError, match=r"'other' has none of the measured runs.*simulate --like"):
        render([result], other)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([run("1P1D", "basic", 10.0, {"PE0": 5})], "Some figures rest on a single run"),
        (
            [run("1P1D", "basic", 10.0, {"PE0": 5}, 10.0), run("1P1D", "oracle", 9.5, {"PE0": 5}, 10.0)],
            "1P1D: oracle, whose I/O is free, is only 1.05× basic; the job waits for compute",
        ),
        (
            [run("1P1D", "basic", s, {"PE0": 5}, 10.0) for s in (9.0, 11.0)]
            + [run("1P1D", "dualpath", s, {"PE0": 5}, 10.0) for s in (8.0, 9.5)],
            "1P1D: the repeats of dualpath and basic overlap",
        ),
        ([run("1P1D", "dualpath", 4.0, {"PE0": 5}, 10.0, 2.0)], "1P1D: dualpath beats its ideal by 25%"),
        ([run("1P1D", "dualpath", 4.0, {"PE0": 5}, errors=7)], "Turns failed in 1P1D dualpath (7)."),
        ([run("1P1D", "dualpath", 4.0, {"PE0": 5})], "The file keeps no turns"),
    ],
)
def test_what_to_distrust_is_said(runs, said):
    assert said in render([decode(document(*runs))]).replace("&#39;", "'")


def test_sound_results_raise_no_doubt(result):
    page = render([result])
    doubts = re.search(r'class="caution">.*?<ul>(.*?)</ul>', page, flags=re.S).group(1)
    assert re.findall("<li>(.*?)</li>", doubts) == [
        "Links are emulated: real bytes, held to the given rates by the traffic manager on one machine."
    ]


def test_several_files_on_one_page_are_told_apart(result):
    page = render(
        [result, msgspec.structs.replace(result, name="again"), msgspec.structs.replace(result, name="again")]
    )
    titles = [title for title, _, _ in cards(page)]
    assert titles[::2] == [f"{name} 1P1D: dualpath over basic" for name in ("synthetic", "again (2)", "again (3)")]
    labels = json.loads(packed(page))["runs"]["labels"]
    assert len(labels) == 54 and len(set(labels)) == 54


def test_old_files_without_turns_have_a_page_without_a_timeline():
    page = render([decode(full())])
    assert 'id="timeline"' not in page and 'id="turns"' not in page
    assert [section["id"] for section in json.loads(packed(page))["sections"]] == ["times", "traffic"]


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="have no runs"):
        render([decode(document())])


def test_rates_and_balance_come_from_the_samples(result):
    sections = {one["id"]: one for one in json.loads(packed(render([result])))["sections"]}
    (rates,) = sections["rates"]["charts"]
    at = sections["rates"]["options"].index("1P1D basic #1")
    prefill, decode_side = rates["variants"][at]["rows"]
    assert prefill[0] == "PE0" and prefill[2] == pytest.approx(RATE / 1e6, rel=0.01)
    assert decode_side == ["DE0", 0.0, 0.0]
    assert rates["variants"][at]["layout"]["shapes"][0]["y0"] == RATE / 1e6
    balance = sections["traffic"]["charts"][1]["variants"][0]["rows"]
    assert balance[0][0] == "dualpath" and 1 <= balance[0][3] < 1.05


def test_stages_and_sweeps_are_charted():
    swept = synthetic(topologies=("1P1D",), agents=4, points=({"agents": 2}, {"agents": 6}), timings=True)
    sections = {one["id"]: one for one in json.loads(packed(render([swept])))["sections"]}
    assert sections["sweeps"]["options"] == ["agents: 1P1D"]
    over_basic = sections["sweeps"]["charts"][1]["variants"][0]
    dualpath = next(trace for trace in over_basic["traces"] if trace["name"] == "dualpath")
    assert dualpath["x"] == [2, 6]
    assert dualpath["y"] == [round(run.ratio_to_basic, 4) for run in swept.runs if run.system == "dualpath"]
    breakdown = sections["breakdown"]["charts"][0]["variants"][0]
    turns = swept.runs[0].turn_results
    mean_s = sum(turn.timings.read_s for turn in turns) / len(turns)
    read = next(trace for trace in breakdown["traces"] if trace["name"] == "read")
    assert read["x"][0] == pytest.approx(mean_s, abs=1e-4)
    untold = synthetic(topologies=("1P1D",), agents=2, timings=False)
    assert "Some turns have no stages" in render([untold])
    assert "breakdown" not in {one["id"] for one in json.loads(packed(render([untold])))["sections"]}


def test_distributions_are_of_all_turns_of_all_repeats(result):
    sections = {one["id"]: one for one in json.loads(packed(render([result])))["sections"]}
    ttft = sections["latency"]["charts"][0]["variants"][0]
    times_s = sorted(
        turn.ttft_s
        for run in result.runs
        if (run.topology, run.system) == ("1P1D", "basic")
        for turn in run.turn_results
    )
    assert ttft["rows"][0][:2] == ["basic", 180]
    trace = ttft["traces"][0]
    assert (trace["x"][0], trace["x"][-1], trace["y"][-1]) == (round(times_s[0], 4), round(times_s[-1], 4), 1.0)


def test_the_file_is_replaced_only_when_it_is_whole(tmp_path, result):
    out = tmp_path / "report.html"
    out.write_text("before")
    with pytest.raises(ResultFileError):
        write_report(result, out, synthetic(topologies=("4P1D",)))
    assert out.read_text() == "before"
    write_report(result, out)
    assert out.read_text().startswith("<!DOCTYPE html>") and [path.name for path in tmp_path.iterdir()] == [
        "report.html"
    ]


def test_the_command_makes_a_page_and_says_what_is_in_it(tmp_path, result, capsys):
    source = tmp_path / "result.json"
    source.write_bytes(msgspec.json.encode(result))
    out = tmp_path / "page.html"
    assert main(["report", str(source), "--out", str(out), "--json", str(tmp_path / "made.json")]) == 0
    assert "18 runs, 1,080 turns" in capsys.readouterr().out
    made = json.loads((tmp_path / "made.json").read_text())
    assert made == {"out": str(out), "html_bytes": out.stat().st_size, "runs": 18, "turns": 1080}


def test_the_command_says_what_it_can_not_use(tmp_path, capsys):
    source = tmp_path / "result.json"
    assert main(["report", str(source), "--out", str(tmp_path / "page.html")]) == 2
    assert "result.json can't be read: No such file" in capsys.readouterr().err
    source.write_text(json.dumps(full()))
    assert main(["report", str(source), "--out", str(tmp_path / "missing" / "page.html")]) == 1
    assert "missing is not a directory; make it" in capsys.readouterr().err
    source.write_text(json.dumps(document()))
    assert main(["report", str(source), "--out", str(tmp_path / "page.html")]) == 2
    assert "have no runs" in capsys.readouterr().err
