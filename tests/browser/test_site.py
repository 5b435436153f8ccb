"""The site as a reader sees it: accessible, quiet, and found by a pasted error. Where the extra `docs` is installed."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.accessibility import assert_accessible
from tests.browser.chromium import Chromium

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[2]
READY = "document.readyState === 'complete' && location.href !== 'about:blank'"
PAGES = [
    *("", "routing/", "exact_entropy/", "zoo_table/", "changelog/", "pages/"),
    *("reference/python/", "reference/command_line/", "reference/errors/", "guides/train_your_own/"),
]
ERROR = "SpecError: model.layers[0].moe.router.top_k is 9, but num_experts is 7 (mine.yaml). Use top_k <= 7."


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the site strictly, and serve it on this machine."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed; make docs installs it")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_page_is_accessible_and_asks_no_other_host(
    browser: Chromium, site: str, page: str, width: int, dark: bool
) -> None:
    browser.call("Page.navigate", url="about:blank")
    browser.wait("location.href === 'about:blank'")
    browser.call("Storage.clearDataForOrigin", origin=site.rstrip("/"), storageTypes="local_storage")  # the last scheme
    scheme = "slate" if dark else "default"
    browser.open(site + page, width, dark=dark, ready=f"{READY} && document.body.dataset.mdColorScheme === '{scheme}'")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run("[...document.querySelectorAll('.error')].slice(30).forEach(error => error.remove())")  # as the others
    assert_accessible(browser)
    assert browser.problems == []
    assert [each for each in browser.requests if not each.startswith((site, "about:", "data:", "blob:"))] == []


def test_a_pasted_error_finds_its_message(browser: Chromium, site: str) -> None:
    browser.open(f"{site}reference/errors/", ready=READY)
    browser.run("document.querySelector('#error-text').focus()")
    browser.call("Input.insertText", text=ERROR)
    assert browser.text("#find-error .error .title").startswith("router.top_k is top_k, but num_experts is num_choices")
    browser.call("Input.insertText", text="x" * 9)
    browser.run(f"document.querySelector('#error-text').value = {json.dumps('something else entirely')}")
    browser.call("Input.insertText", text="!")
    assert browser.text("#find-error output") == "No message is like this one."


def test_the_search_takes_an_error_and_an_option_as_they_are_written(browser: Chromium, site: str) -> None:
    for text, page in ((ERROR, "reference/errors/"), ("--allow-overcommit", "reference/command_line/")):
        browser.open(site, ready=READY)
        browser.run("document.querySelector('.md-search__input').focus()")
        browser.call("Input.insertText", text=text)
        browser.press("End")
        browser.wait(f"document.querySelector('.md-search-result__link')?.href.includes('{page}')")
        assert browser.problems == []
