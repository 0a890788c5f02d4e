"""The site made of docs/: built without a warning, and read in a browser without a network or a server."""

import subprocess
import sys

import pytest
from browser import assert_quiet, show
from lines import ROOT

LESSONS = sorted(path.stem for path in (ROOT / "docs/lessons").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-d", folder / "doctrees", ROOT / "docs", folder / "html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_shows_and_the_next_one_is_a_click_away(browser, site):
    show(browser, site / "lessons" / f"{LESSONS[0]}.html")
    for lesson in LESSONS:
        assert browser.current_url.endswith(f"{lesson}.html")
        assert_quiet(browser)
        assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
        browser.get(browser.find_element("css selector", "a.next-page").get_attribute("href"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_needs_no_scrolling_sideways(browser, site, scheme):
    size = browser.get_window_size()
    browser.set_window_size(500, 800)
    try:
        for lesson in LESSONS:
            show(browser, site / "lessons" / f"{lesson}.html", scheme)
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), lesson
    finally:
        browser.set_window_size(size["width"], size["height"])


def test_the_search_finds_a_lesson(browser, site):
    show(browser, site / "search.html")
    browser.get((site / "search.html").as_uri() + "?q=topological")
    results = browser.execute_async_script("""
        const done = arguments[0], look = () => {
            const found = [...document.querySelectorAll("#search-results li a")].map(a => a.textContent);
            found.length ? done(found) : setTimeout(look, 50);
        };
        look();
    """)
    assert "2. In which order to go back" in results
