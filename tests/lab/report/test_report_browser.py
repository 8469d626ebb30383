"""The page in a real browser. Needs Debian's chromium and chromium-driver, or Chrome and chromedriver on the PATH."""

import json
import shutil

import pytest
from synthetic_results import synthetic

from dualpath.lab.report.html import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no chromium and chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)",
    ),
    pytest.mark.slow,
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
READY_WITHIN_S = 60


@pytest.fixture(scope="module")
def result():
    return synthetic(repeats=2, agents=6)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(READY_WITHIN_S)
    # The window's own first page makes requests of its own; from here on, all that is logged is ours.
    driver.get("data:,")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, result, tmp_path_factory):
    """Opened once: every test chooses what it looks at."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(result, out)
    return opened(browser, out)


def opened(browser, path):
    from selenium.webdriver.support.ui import WebDriverWait

    for kind in ("performance", "browser"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    WebDriverWait(browser, READY_WITHIN_S).until(lambda driver: driver.execute_script(READY))
    return browser


READY = "return document.documentElement.dataset.ready === 'true'"
NEXT_FRAMES = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()));"
PIXELS = "return document.querySelector('#timeline canvas').toDataURL()"


def chosen(page, selector, index):
    """Choose an option as a user would; returns after what it changes has been drawn."""
    script = "const s = document.querySelector(arguments[0]); s.selectedIndex = arguments[1];"
    page.execute_script(script + "s.dispatchEvent(new Event('change'));", selector, index)
    page.execute_async_script(NEXT_FRAMES)


def drawn(page, chart):
    """Bring a chart into view; returns the traces that plotly has drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = "const p = document.querySelector(`#${arguments[0]} .plot`); p.scrollIntoView(); return Boolean(p.data)"
    WebDriverWait(page, READY_WITHIN_S).until(lambda driver: driver.execute_script(script, chart))
    return page.execute_script(f"return document.querySelector('#{chart} .plot').data.map(t => [t.name, t.y])")


def column(page, table, at):
    script = "return [...document.querySelectorAll(arguments[0])].map(cell => cell.textContent)"
    return page.execute_script(script, f"#{table} tbody td:nth-child({at})")


def texts(page, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)"
    return page.execute_script(script, selector)


def filtered(page, text):
    script = (
        "const f = document.querySelector('#turns input'); f.value = arguments[0]; f.dispatchEvent(new Event('input'))"
    )
    page.execute_script(script, text)
    return texts(page, "#turns [role=status]")[0]


def click(page, selector):
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def test_it_makes_no_request_and_logs_no_error(page):
    for chart in ("jct", "snic-bytes", "snic-rate", "breakdown", "cdf-tpot"):
        assert drawn(page, chart)
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file://", "data:", "blob:"))] == []
    assert sum(url.startswith("file://") for url in urls) == 1
    assert page.get_log("browser") == []


def test_the_policy_forbids_requests_even_if_a_script_tried(page):
    script = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), e => done(e.message))"
    assert "Failed to fetch" in page.execute_async_script(script)
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_the_headline_shows_the_computed_ratio(page, result):
    runs = [run for run in result.runs if (run.topology, run.system) == ("1P1D", "dualpath")]
    median = min(run.ratio_to_basic for run in runs if run.jct_s == min(other.jct_s for other in runs))
    assert texts(page, ".card .figure")[0] == f"{median:.2f}×"


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(page, result):
    times = [f"{run.jct_s:.2f}" for run in result.runs]
    assert column(page, "runs", 4) == times
    click(page, "#runs th[data-key=jct] button")
    assert column(page, "runs", 4) == sorted(times, key=float, reverse=True)
    assert page.execute_script("return document.querySelector('#runs th[data-key=jct]').ariaSort") == "descending"
    click(page, "#runs th[data-key=jct] button")
    assert column(page, "runs", 4) == sorted(times, key=float)


def test_a_filter_keeps_what_it_names(page, result):
    turns = [(run, turn) for run in result.runs for turn in run.turn_results]
    assert filtered(page, "") == f"{len(turns)} turns, page 1 of {-(-len(turns) // 50)}"
    slow = [t for run, t in turns if (run.topology, run.system) == ("1P2D", "oracle") and t.ttft_s > 0.3]
    assert 0 < len(slow) < 50
    assert filtered(page, "1P2D oracle ttft>300") == f"{len(slow)} turns"
    assert set(column(page, "turns", 1)) == {"1P2D oracle #1", "1P2D oracle #2"}
    assert filtered(page, "round=1").startswith(f"{sum(turn.round_index == 1 for _, turn in turns)} turns")
    assert filtered(page, "nonsense>3").startswith("no such comparison; columns: run, agent, round")
    assert page.execute_script("return document.querySelector('#turns input').ariaInvalid") == "true"


def test_turns_are_shown_a_page_at_a_time(page):
    filtered(page, "")
    assert len(column(page, "turns", 1)) == 50
    first = column(page, "turns", 5)
    page.execute_script("[...document.querySelectorAll('#turns .tools button')].at(-1).click()")
    assert len(column(page, "turns", 1)) == 50 and column(page, "turns", 5) != first


def test_another_run_changes_the_timeline(page, result):
    from selenium.webdriver.common.by import By

    chosen(page, "#timeline-run", 0)
    canvas = page.find_element(By.CSS_SELECTOR, "#timeline canvas")
    assert canvas.get_attribute("aria-label").startswith("Timeline of 1P1D basic #1: 30 turns of 6 agents in ")
    before = page.execute_script(PIXELS)
    chosen(page, "#timeline-run", 2)
    assert canvas.get_attribute("aria-label").startswith("Timeline of 1P1D oracle #1")
    assert f"in {result.runs[2].jct_s:.1f} s" in canvas.get_attribute("aria-label")
    by_agent = page.execute_script(PIXELS)
    chosen(page, "#timeline-lanes", 1)
    assert len({before, by_agent, page.execute_script(PIXELS)}) == 3


def test_the_timeline_answers_keys(page, result):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    chosen(page, "#timeline-run", 0)
    chosen(page, "#timeline-lanes", 0)
    canvas = page.find_element(By.CSS_SELECTOR, "#timeline canvas")
    whole = page.execute_script(PIXELS)
    canvas.send_keys("n")
    first = min(result.runs[0].turn_results, key=lambda turn: turn.start_s)
    facts = texts(page, "#turn-facts")[0]
    assert facts.startswith(f"{first.trajectory}, round 1, from {first.start_s:.2f} s")
    assert f"{first.loaded_tokens:,} loaded" in facts and f"{first.timings.prefill_engine} read" in facts
    seen = [whole]
    for key in ("", "+", Keys.ARROW_RIGHT, "-", "+", "0"):
        canvas.send_keys(key)
        page.execute_async_script(NEXT_FRAMES)
        seen.append(page.execute_script(PIXELS))
    _, marked, nearer, later, out_again, _, all_again = seen
    assert len({whole, marked, nearer, later}) == 4
    assert marked == out_again == all_again


def test_a_point_of_the_timeline_tells_its_turn(page, result):
    point = """
    const canvas = document.querySelector('#timeline canvas');
    const box = canvas.getBoundingClientRect();
    const at = { clientX: box.left + 130, clientY: box.top + 40, bubbles: true };
    canvas.dispatchEvent(new PointerEvent('pointermove', at));
    return document.querySelector('#timeline .tip').textContent"""
    chosen(page, "#timeline-run", 0)
    chosen(page, "#timeline-lanes", 0)
    earliest = min(result.runs[0].turn_results, key=lambda turn: turn.start_s)
    assert page.execute_script(point).startswith(f"{earliest.trajectory}, round 1")


def test_charts_follow_their_choice_and_the_theme(page, result):
    first = drawn(page, "snic-rate")
    chosen(page, "#rates select", 3)
    assert drawn(page, "snic-rate") != first
    font = "return document.querySelector('#jct .plot').layout.font.color"
    drawn(page, "jct")
    light = page.execute_script(font)
    click(page, "#theme")
    assert page.execute_script(font) != light


def test_narrow_screens_need_no_sideways_scrolling(page):
    from selenium.webdriver.support.ui import WebDriverWait

    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for chart in ("jct", "snic-bytes", "cdf-ttft"):
            drawn(page, chart)
        # plotly draws anew for another width after a moment of its own
        fits = "return document.documentElement.scrollWidth <= 390"
        WebDriverWait(page, READY_WITHIN_S).until(lambda driver: driver.execute_script(fits))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_printed_page_has_every_chart_in_light_colours_and_no_wider_than_paper(page):
    from selenium.webdriver.support.ui import WebDriverWait

    drawn(page, "jct")
    wide = "return document.querySelector('#jct .plot svg').clientWidth > 900"
    WebDriverWait(page, READY_WITHIN_S).until(lambda driver: driver.execute_script(wide))
    page.execute_script(NOTE_WHAT_IS_PRINTED)
    page.execute_script("document.documentElement.dataset.theme = 'dark'")
    assert page.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBER")
    printed = page.execute_script("return window.printed")
    assert printed["undrawn"] == 0 and printed["inks"] == ["rgb(27, 31, 36)"]
    assert 300 < printed["widest"] <= 190 / 25.4 * 96 + 1
    assert page.execute_script("return document.documentElement.dataset.theme") == "dark"


NOTE_WHAT_IS_PRINTED = """
addEventListener('beforeprint', () => {
  const plots = [...document.querySelectorAll('figure:not([hidden]) .plot')];
  window.printed = {
    undrawn: plots.filter(plot => !plot.data).length,
    inks: [...new Set(plots.map(plot => getComputedStyle(plot.querySelector('.xtick text')).fill))],
    widest: Math.max(...plots.map(plot => plot.querySelector('svg').clientWidth)),
  };
});
"""
