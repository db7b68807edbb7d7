"""The report in headless Chromium, opened as a file: charts are drawn, nothing complains, it reads on a phone and in the dark."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffrl.report.page import write_report
from tests.axe import violations
from tests.browser import CHROMIUM, Browser, chromium
from tests.diffrl.board_run import Shape
from tests.diffrl.report_runs import make_rl_run, make_sft_run
from tests.diffrl.test_board_browser import FAINT, PHONE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        assert not os.environ.get("CI"), f"{CHROMIUM} is missing: make browser"
        pytest.skip(f"{CHROMIUM} is missing: make browser")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Addresses: seeds of two methods and an autoregressive run; two runs; a supervised one."""
    root = tmp_path_factory.mktemp("runs")

    def rl(name: str, seed: int, estimator: str) -> Path:
        shape = Shape(steps=8, groups=4, group_size=6, seed=seed + 10 * len(estimator))
        return make_rl_run(root / name, seed, {"estimator": estimator}, shape)

    seeds = [rl(f"{name}-{seed}", seed, name) for name in ("coupled", "decoupled") for seed in (0, 1)]
    runs = {
        "many": [*seeds, rl("causal-0", 0, "causal")],
        "two": [seeds[0], seeds[2]],
        "sft": [make_sft_run(root / "sft", 0)],
    }
    return {
        name: write_report([str(folder) for folder in folders], str(root / f"{name}.html")).as_uri()
        for name, folders in runs.items()
    }


@pytest.fixture(autouse=True)
def calm(browser) -> Iterator[None]:
    browser.errors.clear()
    browser.size(1280, 900)
    browser.scheme("light")
    yield
    browser.eval("1")  # whatever has been said meanwhile
    assert browser.errors == []


def go(browser: Browser, address: str) -> None:
    browser.open("about:blank")
    browser.open(address)
    browser.wait("document.readyState === 'complete' && document.querySelectorAll('section').length > 1")


def test_charts_are_drawn(browser, pages):
    go(browser, pages["many"])
    titles = browser.eval("[...document.querySelectorAll('figcaption b')].map((e) => e.textContent)")
    assert titles[:2] == ["Reward", "Solved"] and titles.count("global AR-ness@1") == 1 and len(titles) == 10
    lines = "[...document.querySelector('.chart svg').querySelectorAll('path.line')]"
    drawn = browser.eval(
        f"{lines}.map((p) => [p.getTotalLength(), getComputedStyle(p).stroke, getComputedStyle(p).fill])"
    )
    assert len(drawn) == 3 and all(length > 100 and fill == "none" for length, _, fill in drawn)
    assert len({color for _, color, _ in drawn}) == 3
    bands = browser.eval("[...document.querySelectorAll('.chart path.band')].map((p) => p.getBBox().height)")
    assert len(bands) > 10 and max(bands) > 5
    boxes = browser.eval(
        "[...document.querySelectorAll('.plot')].filter((s) => s.checkVisibility()).map((s) => s.getBoundingClientRect().height)"
    )
    assert min(boxes) > 120
    # nothing of a chart lies outside of it
    outside = browser.eval("""[...document.querySelectorAll('.plot')].flatMap((s) => { const o = s.getBoundingClientRect();
        return [...s.children].filter((e) => { const b = e.getBoundingClientRect(); return b.left < o.left - 1 ||
            b.right > o.right + 1 || b.top < o.top - 1 || b.bottom > o.bottom + 1; }).map((e) => e.outerHTML); })""")
    assert outside == []


def test_nothing_but_the_page_is_loaded(browser, pages):
    go(browser, pages["two"])
    assert browser.eval("performance.getEntriesByType('resource').length") == 0
    assert browser.eval("document.styleSheets[0].cssRules.length") > 40  # the policy lets its own style in
    colors = browser.eval(
        "[...document.querySelectorAll('.tokens span')].map((s) => getComputedStyle(s).backgroundColor)"
    )
    assert len(colors) > 100 and len(set(colors)) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_read_in_light_and_dark(browser, pages, scheme):
    browser.scheme(scheme)
    for name in pages:
        go(browser, pages[name])
        browser.eval("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert browser.eval(FAINT) == [], name
        assert violations(browser) == [], name
    paper = [int(v) for v in re.findall(r"\d+", browser.eval("getComputedStyle(document.body).backgroundColor"))]
    assert (min(paper) > 200) if scheme == "light" else (max(paper) < 60)
    folder = os.environ.get("DIFFRL_SCREENSHOTS")
    if folder:
        for name in pages:
            go(browser, pages[name])
            picture(browser, Path(folder) / f"{name}-{scheme}.png")


def test_a_phone_scrolls_no_page_sideways(browser, pages):
    browser.size(PHONE, 800, phone=True)
    for name in pages:
        go(browser, pages[name])
        browser.eval("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert browser.eval("document.documentElement.scrollWidth") <= PHONE, name
        assert browser.eval("Math.min(...[...document.querySelectorAll('.plot')].map((s) => s.clientWidth))") > 280
    if folder := os.environ.get("DIFFRL_SCREENSHOTS"):
        go(browser, pages["many"])
        picture(browser, Path(folder) / "phone.png")


def picture(browser: Browser, file: Path) -> None:
    """The whole page."""
    width = browser.eval("innerWidth")
    browser.size(width, min(6000, browser.eval("document.documentElement.scrollHeight")))
    browser.screenshot(file)
    browser.size(width, 900)


def test_it_can_be_printed(browser, pages):
    """On paper everything is open, and nothing is cut off at the side."""
    go(browser, pages["two"])
    browser.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.eval("document.querySelector('nav').checkVisibility()") is False
        assert browser.eval("document.querySelector('details pre').getBoundingClientRect().height") > 20
        made = browser.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"]
        assert len(made) > 20_000
    finally:
        browser.send("Emulation.setEmulatedMedia", media="")
