"""The board in headless Chromium: what a reader does, and what a hostile completion must not do."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl.board.server import BoardOptions, open_board
from diffrl.rollout_store import step_file
from tests.axe import violations
from tests.browser import CHROMIUM, Browser, BrowserError, chromium
from tests.diffrl.board_run import Shape, add_step, make_run

pytestmark = pytest.mark.slow

SHAPE = Shape(steps=8, groups=4, group_size=6, problems=8)
ROWS = SHAPE.steps * SHAPE.groups * SHAPE.group_size
PHONE = 375


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if shutil.which(CHROMIUM) is None:
        assert not os.environ.get("CI"), f"{CHROMIUM} is missing: make browser"
        pytest.skip(f"{CHROMIUM} is missing: make browser")
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", SHAPE)


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("runs") / "second", Shape(steps=8, groups=4, group_size=6, problems=8, seed=1)
    )


@contextmanager
def serving(*folders: Path, token: str | None = None) -> Iterator[str]:
    """The address of a board, once it has looked at everything."""
    with open_board([str(folder) for folder in folders], BoardOptions(port=0, token=token)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.url
        finally:
            server.board.close()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def url(first, second) -> Iterator[str]:
    with serving(first, second) as url:
        yield url


@pytest.fixture(autouse=True)
def calm(browser) -> Iterator[None]:
    """Every test begins with a wide light window and ends with a console that has nothing to say."""
    browser.errors.clear()
    browser.size(1280, 900)
    browser.scheme("light")
    yield
    browser.eval("1")  # whatever has been said meanwhile
    assert browser.errors == []


def go(browser: Browser, url: str, place: str, until: str) -> None:
    browser.open("about:blank")
    browser.open(f"{url}#/{place}")
    browser.wait(until)


def text(browser: Browser, selector: str) -> str:
    return browser.eval(f"document.querySelector({json.dumps(selector)}).textContent")


def count(browser: Browser, selector: str) -> int:
    return browser.eval(f"document.querySelectorAll({json.dumps(selector)}).length")


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.eval(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")


def quoted(browser: Browser, text: str) -> str:
    """As it stands in an address."""
    return browser.eval(f"encodeURIComponent({json.dumps(text)})")


def hash_of(browser: Browser) -> str:
    return browser.eval("location.hash")


TOTAL = "document.querySelector('.pager')?.textContent.includes('{} rollouts')"
TABLE = "document.querySelectorAll('.rollouts tbody tr').length > 0"
TOKENS = "document.querySelectorAll('.tok').length > 3"
ROLLOUT = "rollout?step=7&ordinal=28&sample=1"
PLACES = {
    "overview": "document.querySelectorAll('.chart').length > 4",
    "rollouts": TABLE,
    ROLLOUT: TOKENS,
    "suspicious": TABLE,
    "problems": "document.querySelectorAll('.problems tbody tr').length > 0",
    "order": "document.querySelectorAll('canvas').length === 2",
    "compare": "document.querySelectorAll('.problems tbody tr').length > 0",
}


def test_overview_has_facts_and_curves_of_both_runs(browser, url):
    go(browser, url, "overview", "document.querySelectorAll('.chart').length > 4")
    facts = texts(browser, ".fact b")
    assert facts[:2] == ["8 of 8", str(ROWS)] and len(facts) == 8
    curves = browser.eval(
        "[...document.querySelector('.chart').querySelectorAll('path')].map((p) => p.getAttribute('d').split('L').length)"
    )
    assert curves == [SHAPE.steps, SHAPE.steps]
    browser.move(".chart")
    browser.wait(
        "/^step [0-9]: first/.test(document.querySelector('.readout').textContent.replace(/runs.*?.first/, 'first'))"
    )
    browser.eval("""(() => { const s = document.querySelector('select[aria-label="Add a curve"]');
        s.value = 'time/learner'; s.dispatchEvent(new Event('change')); })()""")
    browser.wait("[...document.querySelectorAll('figcaption')].some((e) => e.textContent.startsWith('time/learner'))")
    assert "time%2Flearner" in hash_of(browser)


def test_filter_sort_and_share_a_table(browser, url):
    go(browser, url, "rollouts", TOTAL.format(ROWS))
    browser.eval("""(() => { const s = document.querySelector('select[name=verdict]');
        s.value = 'passed'; s.dispatchEvent(new Event('input', {bubbles: true})); })()""")
    browser.wait("location.hash.includes('verdict=passed')")
    browser.wait("[...document.querySelectorAll('td.col-verdict')].every((e) => /^.passed$/.test(e.textContent))")
    passed = int(text(browser, ".pager span:nth-child(2)").split("· ")[1].split()[0])
    assert 0 < passed < ROWS
    browser.click("th.col-length a")
    browser.wait("document.querySelector('th.col-length').ariaSort === 'descending'")
    lengths = browser.eval("[...document.querySelectorAll('td.col-length')].map((e) => Number(e.textContent))")
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    shared = hash_of(browser)
    go(browser, url, shared.removeprefix("#/"), TOTAL.format(passed))
    assert browser.eval("document.querySelector('select[name=verdict]').value") == "passed"
    assert browser.eval("[...document.querySelectorAll('td.col-length')].map((e) => Number(e.textContent))") == lengths


def test_replay_shows_tokens_in_the_order_of_their_steps(browser, url):
    go(browser, url, ROLLOUT, TOKENS)
    size, end = count(browser, ".tok"), int(browser.eval("document.querySelector('.slider').max"))
    assert count(browser, ".tok.masked") == 0
    masked = []
    for frame in range(end + 1):
        browser.eval(f"""(() => {{ const s = document.querySelector('.slider');
            s.value = '{frame}'; s.dispatchEvent(new Event('input')); }})()""")
        masked.append(count(browser, ".tok.masked"))
    assert masked[0] == size and masked[-1] == 0 and masked == sorted(masked, reverse=True)
    assert "at=" not in hash_of(browser)
    colors = browser.eval("[...document.querySelectorAll('.tok')].map((e) => e.style.getPropertyValue('--step'))")
    assert len(set(colors)) == end
    browser.key("Home")
    browser.wait("location.hash.includes('at=0')")
    browser.key("ArrowRight")
    browser.wait("location.hash.includes('at=1')")
    assert count(browser, ".tok.masked") == masked[1]
    shared = hash_of(browser)
    go(browser, url, shared.removeprefix("#/"), f"document.querySelectorAll('.tok.masked').length === {masked[1]}")
    browser.key(" ")
    browser.wait("document.querySelector('.play').textContent === 'Stop'")
    browser.wait("document.querySelectorAll('.tok.masked').length === 0")
    browser.wait("document.querySelector('.play').textContent === 'Play'")


def test_confidence_is_told_on_hover_and_focus(browser, url):
    go(browser, url, ROLLOUT, TOKENS)
    browser.move(".tok:nth-child(2)")
    browser.wait("document.querySelector('.detail').textContent.startsWith('token 2 of')")
    assert "probability 0." in text(browser, ".detail")
    browser.eval("document.querySelector('.tok').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    browser.wait("document.querySelector('.detail').textContent.startsWith('token 3 of')")
    assert count(browser, '.tok[tabindex="0"]') == 1


def test_siblings_stand_side_by_side(browser, url):
    go(browser, url, ROLLOUT, TOKENS)
    assert count(browser, ".sibling") == SHAPE.group_size and count(browser, ".sibling[aria-current]") == 1
    assert count(browser, ".advantage-bar i") == SHAPE.group_size
    tops = browser.eval(
        "[...document.querySelectorAll('.sibling')].slice(0, 3).map((e) => e.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    browser.key("s")
    browser.wait("location.hash.includes('sample=2')")
    browser.wait("document.querySelector('.sibling[aria-current] h3').textContent.startsWith('sample 2')")


def test_suspicious_rewards_are_listed_with_their_heuristics(browser, url):
    go(browser, url, "suspicious", TABLE)
    browser.wait("document.querySelectorAll('.heuristics dd').length === 4")
    assert browser.eval("[...document.querySelectorAll('td.col-flags')].every((e) => e.querySelector('.flag'))")
    browser.click(".heuristics dt a")
    browser.wait("location.hash.includes('flag=low_trust')")
    browser.wait("[...document.querySelectorAll('td.col-trust')].every((e) => e.textContent === 'low')")


def test_a_problem_over_time(browser, url):
    go(browser, url, "problems", "document.querySelectorAll('.problems tbody tr').length === 8")
    browser.click(".problems tbody a")
    browser.wait("location.hash.startsWith('#/problem?id=')")
    browser.wait("document.querySelectorAll('.sibling').length > 6")
    steps = browser.eval(
        "[...document.querySelectorAll('.view section > h2')].map((e) => e.textContent).filter((t) => t.startsWith('Step'))"
    )
    assert steps == sorted(steps, reverse=True) and len(steps) > 1


def test_decoding_order_is_drawn(browser, url):
    go(browser, url, "order", "document.querySelectorAll('canvas').length === 2")
    assert browser.eval("[document.querySelector('canvas').width, document.querySelector('canvas').height]") == [8, 24]
    drawn = browser.eval(
        "(() => { const c = document.querySelector('canvas'); const d = c.getContext('2d').getImageData(0, 0, 8, 24).data; "
        "return new Set(Array.from({length: 192}, (_, n) => [d[4 * n], d[4 * n + 1], d[4 * n + 2]].join())).size; })()"
    )
    assert drawn > 20


def test_two_runs_are_compared_completion_by_completion(browser, url):
    go(browser, url, "compare", "document.querySelectorAll('.problems tbody tr').length > 5")
    browser.click(".problems tbody a")
    browser.wait(f"document.querySelectorAll('.pairs .sibling').length === {2 * SHAPE.group_size}")
    tops = browser.eval(
        "[...document.querySelectorAll('.pairs .sibling')].slice(0, 2).map((e) => e.getBoundingClientRect().top)"
    )
    assert tops[0] == tops[1]
    assert browser.eval(
        "[...document.querySelectorAll('.pairs .sibling:nth-of-type(even) a')].every((e) => e.hash.includes('run=1'))"
    )


def test_the_keyboard_alone_finds_a_rollout(browser, url):
    go(browser, url, "overview", "document.querySelectorAll('.chart').length > 4")
    browser.key("?")
    browser.wait("document.getElementById('keys').open")
    browser.key("Escape")
    browser.wait("!document.getElementById('keys').open")
    browser.key("2")
    browser.wait(TABLE)
    browser.key("/")
    browser.wait("document.activeElement.name === 'problem'")
    name = text(browser, "td.col-problem a").split(" ")[0]
    browser.type(name)
    browser.wait("location.hash.includes('problem=')")
    browser.wait(
        f"[...document.querySelectorAll('.rollouts tbody a')].every((a) => a.textContent.startsWith({json.dumps(name)}))"
    )
    browser.key("Escape")
    for key in "jjk":
        browser.key(key)
    assert (
        browser.eval(
            "[...document.querySelectorAll('.rollouts tbody tr')].findIndex((e) => e.hasAttribute('data-chosen'))"
        )
        == 0
    )
    browser.key("j")
    browser.key("Enter")
    browser.wait(TOKENS)
    before = hash_of(browser)
    browser.key("j")
    browser.wait(f"location.hash !== {json.dumps(before)}")


def test_light_and_dark(browser, url):
    go(browser, url, "rollouts", TABLE)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.eval(paper)
    browser.scheme("dark")
    browser.wait(f"{paper} !== {json.dumps(light)}")
    browser.click("#theme")
    browser.wait(f"{paper} === {json.dumps(light)}")
    go(browser, url, "overview", f"{paper} === {json.dumps(light)}")  # remembered
    browser.eval("localStorage.clear()")
    go(browser, url, ROLLOUT, TOKENS)
    assert browser.eval(paper) != light


# elements whose own text has less contrast with what lies behind it than WCAG asks of small text; masked tokens and what is off
# are not meant to be read
FAINT = """(() => {
  const channel = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const light = (...colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => channel(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => (e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : []);
  const contrast = (e) => {
    const under = light(...behind(e)), over = light(...behind(e), getComputedStyle(e).color);
    return (Math.max(under, over) + 0.05) / (Math.min(under, over) + 0.05);
  };
  const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length;
  return [...document.querySelectorAll('body *:not(svg *, .masked, .off, option, .skip, dialog *)')].filter(own)
    .filter((e) => contrast(e) < 4.5).map((e) => `${e.outerHTML.slice(0, 90)} ${contrast(e).toFixed(2)}`);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(browser, url, scheme):
    browser.scheme(scheme)
    for place, until in PLACES.items():
        go(browser, url, place, until)
        assert browser.eval(FAINT) == [], place
        assert violations(browser) == [], place
        nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
        roles = {
            "button",
            "link",
            "textbox",
            "searchbox",
            "combobox",
            "slider",
            "spinbutton",
            "image",
            "img",
            "Canvas",
            "dialog",
        }
        asked = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
        assert len(asked) > 10 and [n for n in asked if not n.get("name", {}).get("value")] == [], place
        assert count(browser, "main h1") == 1


# what reaches beyond a phone's window and is not within something that scrolls or is cut by itself
WIDE = """(() => {
  const kept = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (['auto', 'hidden', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
    return e.getBoundingClientRect().width > 0 && e.getBoundingClientRect().right > innerWidth + 0.5; };
  return [...document.querySelectorAll('main *')].filter(kept).map((e) => e.outerHTML.slice(0, 80));
})()"""


@pytest.mark.parametrize(("place", "until"), PLACES.items())
def test_a_phone_scrolls_no_page_sideways(browser, url, place, until):
    browser.size(PHONE, 800, phone=True)
    go(browser, url, place, until)
    assert browser.eval("[innerWidth, document.documentElement.scrollWidth]") == [PHONE, PHONE]
    assert browser.eval(WIDE) == []


def test_a_live_run_is_followed_without_a_reload(browser, tmp_path):
    folder = make_run(tmp_path / "run", SHAPE, steps=())
    with serving(folder) as url:
        go(browser, url, "rollouts", "document.querySelector('.empty') !== null")
        browser.eval("window.stays = true")
        per_step = SHAPE.groups * SHAPE.group_size
        for step in (0, 1):
            add_step(folder, SHAPE, step)
            browser.wait(TOTAL.format((step + 1) * per_step))
        browser.key("1")
        browser.wait("document.querySelector('.readout')?.textContent.startsWith('step 1:')")
        add_step(folder, SHAPE, 2)
        browser.wait("document.querySelector('.readout')?.textContent.startsWith('step 2:')")
        assert browser.eval("window.stays") is True


EVIL = (
    "<script>window.pwned = 1</script><img src=x onerror=\"window.pwned = 1\"><svg onload='window.pwned = 1'></pre></main>"
    "<style>body{display:none}</style><a href='javascript:window.pwned=1'>x</a>${window.pwned=1}"
    "\x00\x07\x1b[2J\x7f\u202egnp.exe\u2066"
)


def test_hostile_text_stays_text(browser, first, tmp_path):
    folder = Path(shutil.copytree(first, tmp_path / "evil"))
    file = step_file(folder / "rollouts", 0)
    read = pq.read_table(file)
    completions = [EVIL + "A" * 1_000_000, EVIL, *read["completion"].to_pylist()[2:]]
    evil = {name: [EVIL] * len(read) for name in ("problem_id", "prompt", "detail", "family")}
    for name, values in {"completion": completions, **evil}.items():
        column = read.schema.names.index(name)
        read = read.set_column(column, read.schema.field(column), pa.array(values))
    pq.write_table(read, file)
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 0, EVIL: 1.0}) + "\n")
    group = SHAPE.group_size
    with serving(folder) as url:
        places = {
            "rollouts?step_max=0": TOTAL.format(SHAPE.groups * group),
            "rollout?step=0&ordinal=0&sample=0": f"document.querySelectorAll('.sibling').length === {group}",
            "rollout?step=0&ordinal=0&sample=1": f"document.querySelectorAll('.sibling').length === {group}",
            "problems": "document.body.textContent.includes('window.pwned')",
            f"problem?id={quoted(browser, EVIL)}": "document.querySelectorAll('.sibling').length > 3",
            f"overview?m={quoted(browser, EVIL)}": "document.querySelectorAll('.chart').length === 1",
        }
        for place, until in places.items():
            browser.size(PHONE if "sample=0" in place else 1280, 900)
            go(browser, url, place, until)
            assert browser.eval("window.pwned") is None, place
            assert (
                count(browser, "main script, main img, main style, main svg[onload], [onerror], a[href^=javascript]")
                == 0
            ), place
            assert "<script>window.pwned = 1</script>" in browser.eval("document.querySelector('main').textContent"), (
                place
            )
            shown = browser.eval("document.querySelector('main').textContent")
            assert not any(sign in shown for sign in "\x00\x07\x1b\x7f\u202e\u2066"), place
            assert browser.eval("document.documentElement.scrollWidth <= innerWidth"), place
        go(
            browser,
            url,
            "rollout?step=0&ordinal=0&sample=0",
            "document.querySelectorAll('a.button[href*=whole]').length > 0",
        )
        browser.click("a.button[href*=whole]")
        browser.wait("document.querySelector('main').textContent.includes('A'.repeat(1000000))", 120)
        assert browser.eval("window.pwned") is None


def test_a_board_with_a_token_opens_by_its_address(browser, first):
    token = "a-token-of-ours-1234"
    with serving(first, token=token) as url:
        browser.open("about:blank")
        browser.open(f"{url}?token={token}#/rollouts")
        browser.wait(TABLE)
        assert token not in browser.eval("location.href") and browser.eval("document.cookie") == ""


def test_damaged_runs_say_so_on_the_page(browser, first, tmp_path):
    folder = Path(shutil.copytree(first, tmp_path / "damaged"))
    file = step_file(folder / "rollouts", 3)
    file.write_bytes(file.read_bytes()[:1000])
    with serving(folder) as url:
        go(browser, url, "rollouts", TOTAL.format(ROWS - SHAPE.groups * SHAPE.group_size))
        assert "step_000003.parquet: cannot be read as Parquet" in text(browser, "#notes")
        go(browser, url, "rollouts?step_min=x", "document.querySelector('[role=alert]') !== null")
        assert "step_min: 'x' must be a number" in text(browser, "[role=alert]")
    browser.errors[:] = [
        error for error in browser.errors if "400 (Bad Request)" not in error
    ]  # as Chromium logs the answer


def test_the_browser_notices_what_a_console_says(browser):
    """Or all the tests above would see nothing."""
    browser.open("about:blank")
    browser.eval("console.error('seen')")
    with pytest.raises(BrowserError, match="never came true"):
        browser.wait("false", seconds=0.2)
    assert browser.errors == ["seen"]
    browser.errors.clear()
    assert np.isfinite(browser.eval("performance.now()"))
