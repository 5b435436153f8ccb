"""The explorer's page in a browser: what a reader sees and does, by mouse, keyboard and screen reader."""

import re
from pathlib import Path

import pytest

from moezoo.core.explorer.page import demo_trace, explorer_page
from moezoo.core.traces.trace import RoutingTrace
from tests.browser.accessibility import assert_accessible
from tests.browser.chromium import Chromium
from tests.support.traces import synthetic_trace, with_columns

TEXTS = [
    "<img src=x onerror=fail()>",
    "</script>",
    "the ",
    "\n",
    "\u200b\u202eabc",
    " ",
    "Cat",
    "\u0301x",
    "\U0001f600",
]

# Contrast of the text with each color at its strongest, by the formula of WCAG.
CONTRASTS = """(() => {
  const style = getComputedStyle(document.documentElement), read = name => style.getPropertyValue(name).trim();
  const hex = text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16));
  const light = color => color.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0) + .05;
  const ink = light(hex(read('--ink'))), paper = hex(read('--paper')), a = Number(read('--strongest'));
  return ['c0', 'c1', 'c2', 'c3', 'c4', 'c5', 'c6', 'c7', 'one'].map(name => {
    const back = light(read('--' + name).split(' ').map((v, i) => a * v + (1 - a) * paper[i]));
    return Math.max(ink, back) / Math.min(ink, back);
  });
})()"""


def page_of(folder: Path, *traces: RoutingTrace, tokens: int | None = None) -> str:
    path = folder / "page.html"
    path.write_text(explorer_page(traces, range(tokens or traces[0].num_tokens)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(tmp_path_factory.mktemp("demo"), demo_trace())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two traces of hostile tokens; a third of the tokens have other experts in the second, in layers 2 and 4."""
    first = synthetic_trace(60, vocab=len(TEXTS))
    texts = dict(enumerate(TEXTS))
    first = RoutingTrace(first.info, first.source, texts, "/runs/bf16.safetensors")
    rows = first.rows()
    expert = rows.expert.copy()
    expert[::3, 1:] = (expert[::3, 1:] + 1) % 8
    second = with_columns(first, expert=expert).renamed("/runs/4bit.safetensors")
    return page_of(tmp_path_factory.mktemp("pair"), first, second)


def assert_quiet(browser: Chromium, address: str) -> None:
    """Assert that the console is empty, and that nothing but the page was requested."""
    assert browser.problems == []
    assert {request.partition("#")[0] for request in browser.requests} <= {address, "about:blank"}


def selected(browser: Chromium) -> int | None:
    return browser.run("(n => n && Number(n.dataset.n))(document.querySelector('.t[aria-selected=true]'))")


def test_keyboard_moves_through_layers_and_tokens_and_says_so(browser: Chromium, demo: str) -> None:
    browser.open(demo)
    trace = demo_trace()
    assert browser.run("document.querySelectorAll('.t[role=option]').length") == trace.num_tokens
    browser.press("j", "ArrowDown", "k")
    assert browser.text("#layer-name") == "Layer 1"
    browser.press("l", "ArrowRight", "l", "h")
    assert selected(browser) == 1
    rows = trace.rows(1, 2)
    chips = browser.run(
        "[...document.querySelectorAll('#token tbody tr')].map(row => row.querySelector('.chip').innerText)"
    )
    assert [int(chip.split()[0]) for chip in chips] == rows.expert[0, :, 0].tolist()
    weight = rows.weight[0, 1, 0]
    browser.wait(f"/experts {rows.expert[0, 1, 0]} at {weight:.2f}/.test(document.getElementById('live').textContent)")
    runner = browser.run("[...document.querySelectorAll('#token td.runner .chip')].map(chip => Number(chip.innerText))")
    assert runner == rows.runner_up[0].tolist()
    browser.press("End")
    assert selected(browser) == trace.num_tokens - 1
    browser.press("?")
    assert browser.run("document.getElementById('help').open")
    browser.press("Escape", "Escape")
    assert selected(browser) is None
    assert_quiet(browser, demo)


def test_click_shows_a_tokens_path_an_experts_tokens_and_the_load(browser: Chromium, demo: str) -> None:
    browser.open(demo)
    trace = demo_trace()
    browser.click("#t0-40")
    assert selected(browser) == 40
    first = trace.rows(40, 41)
    assert browser.text("#tip").startswith(f"Expert {first.expert[0, 0, 0]} at {first.weight[0, 0, 0]:.2f}, ")
    assert browser.text("#token h2") == "Token 40"
    expert = int(trace.column("expert", 40, 41)[0, 2, 0])
    browser.click("#token tbody tr:nth-child(3) .chip")
    assert browser.text("#layer-name") == "Layer 2"
    assert browser.text("#expert h2") == f"Expert {expert} of layer 2"
    taken = (trace.column("expert")[:, 2] == expert).any(-1)
    assert browser.text("#expert .note").startswith(f"{taken.sum()} tokens")
    assert browser.run("document.querySelectorAll('.t.one').length") == taken.sum()
    best = trace.column("weight")[:, 2][trace.column("expert")[:, 2] == expert].max()
    assert browser.text("#expert .places .value") == f"{best:.2f}"
    browser.click("#expert .places button")
    assert taken[selected(browser)]
    browser.press("Escape")
    assert browser.run("document.querySelectorAll('.t.one').length") == 0
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
    browser.run("document.getElementById('map').focus()")
    browser.press("ArrowUp", "ArrowRight")
    assert browser.text("#expert h2") == "Expert 1 of layer 1"
    browser.click("#map")
    assert re.match(r"Layer \d, expert \d+: \d\.\d\d . even, \d+ tokens", browser.text("#map-cell"))
    assert_quiet(browser, demo)


def test_search_finds_text_across_tokens(browser: Chromium, demo: str) -> None:
    browser.open(demo)
    browser.press("/")
    for letter in "mOral":
        browser.press(letter)
    assert browser.text("#hits") == "1 of 3"
    browser.press("Enter", "Enter")
    assert browser.text("#hits") == "2 of 3"
    start = selected(browser)
    text = "".join(map(demo_trace().text, demo_trace().column("token").tolist()))
    assert start == [found.start() for found in re.finditer("Moral", text)][1]
    assert browser.run("document.querySelectorAll('.t.hit').length") == 15
    browser.press("Escape", "N")
    assert browser.run("document.querySelectorAll('.t.hit').length") == 0
    assert browser.run("document.activeElement.role") == "listbox"
    assert_quiet(browser, demo)


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (400, False)])
def test_page_is_accessible_and_fits(browser: Chromium, tmp_path: Path, width: int, dark: bool) -> None:
    page = page_of(tmp_path, demo_trace(), tokens=100)
    browser.open(page, width, 800, dark)
    browser.click("#t0-3")
    assert browser.run("document.documentElement.scrollWidth") == width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 28)" if dark else "rgb(251, 250, 248)")
    assert_accessible(browser)
    assert_quiet(browser, page)


def test_text_stays_readable_on_every_color_of_each_theme(browser: Chromium, demo: str) -> None:
    """Contrast of the text with its strongest backgrounds, at least 4.5; the theme is chosen by a button or key."""
    browser.open(demo)
    for theme, dark in (("light", False), ("dark", True), ("auto", False)):
        browser.press("t")
        assert browser.text("#theme") == f"Theme: {theme}"
        assert browser.run("'dark' in document.documentElement.dataset") is dark
        contrasts = browser.run(CONTRASTS)
        assert len(contrasts) == 9
        assert min(contrasts) >= 4.5, theme


def test_two_traces_side_by_side_with_differences_marked(browser: Chromium, pair: str) -> None:
    browser.open(pair)
    counts = "[...document.querySelectorAll('#differences .value')].map(node => Number(node.textContent))"
    assert browser.run(counts) == [0, 20, 20]
    assert browser.run("document.querySelectorAll('.differs').length") == 0
    browser.press("j", "d", "d")
    assert selected(browser) == 3
    assert browser.run("[...document.querySelectorAll('#tokens-0 .differs')].map(t => t.dataset.n % 3)") == [0] * 20
    assert browser.run("document.querySelectorAll('#tokens-1 .differs').length") == 20
    assert browser.text("#token tbody tr:nth-child(3) th") == "2 ≠"
    assert browser.run("document.querySelectorAll('#token .chip.other').length") >= 4
    browser.press("D", "D")
    assert selected(browser) == 57
    browser.click("#change")
    assert "B's load less A's" in browser.text("#load-note")
    assert_accessible(browser)
    browser.size(400, 800)
    assert browser.run("document.documentElement.scrollWidth") == 400
    assert browser.run("[...document.querySelectorAll('.pane')].map(pane => pane.offsetWidth > 0)") == [True, False]
    browser.click("#views button:nth-child(2)")
    assert browser.run("[...document.querySelectorAll('.pane')].map(pane => pane.offsetWidth > 0)") == [False, True]
    assert_quiet(browser, pair)


def test_hostile_tokens_are_text_and_invisible_ones_are_shown(browser: Chromium, pair: str) -> None:
    browser.open(pair)
    shown = set(browser.run("[...document.querySelectorAll('#tokens-0 .t')].map(token => token.textContent)"))
    expected = {*TEXTS[:3], "↵\n", "[U+200B][U+202E]abc", " ", "Cat", "◌\u0301x", "\U0001f600"}
    assert shown == expected
    assert browser.run("document.querySelectorAll('#text img, #text script').length") == 0
    assert browser.run("document.querySelector('#tokens-0 .t[aria-label]').ariaLabel") in ("new line", "space")
    assert_quiet(browser, pair)
