"""A headless Chromium of the system, driven by playwright.

Debian: `apt-get install chromium-headless-shell`.
"""

import importlib.util
import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
PHONE, DESK = (390, 844), (1280, 900)

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason=f"needs playwright and one of {', '.join(NAMES)}",
)


@contextmanager
def browser():
    """Start a browser; end it and its processes."""
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not work for root.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def page_of(started, size, **options):
    """Open a page; at the end, assert that it logged and requested nothing odd.

    Yields:
        The page. Its list `requested` has the addresses of all requests.
    """
    width, height = size
    context = started.new_context(
        viewport={"width": width, "height": height}, **options
    )
    page = context.new_page()
    page.requested, logged = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    try:
        yield page
        # Of a status such as 404, Chromium logs that the resource failed.
        assert [
            text for text in logged if "the server responded with" not in text
        ] == []
    finally:
        context.close()


def overflow(page):
    """By how many pixels the page is wider than its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
