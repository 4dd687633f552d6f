"""Headless Chromium for the tests of pages, which skip if playwright or Chromium is missing."""

import shutil
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: apt-get install -y chromium"),
]


@contextmanager
def chromium():
    """Lend a browser."""
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def visits(browser):
    """Lend a function that opens an address, and fail at the end if the page had an error or a foreign request."""
    faults, contexts = [], []

    def visit(url, **settings):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        page = context.new_page()
        page.prompts = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((url, "blob:", "data:")) or faults.append(request.url)
        )
        page.on("request", lambda r: page.prompts.append(r.post_data_json) if r.url.endswith("/masks") else None)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []
