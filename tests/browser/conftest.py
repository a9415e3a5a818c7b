"""One headless browser for all tests of a file, and a record of what its pages print and request."""

from dataclasses import dataclass, field

import pytest

from cxr_fastai.publishing.printing import find_browser

PATIENCE_MS = 60_000
"""Time limit for anything that a page does, in milliseconds, on a busy machine."""
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update']


@pytest.fixture(scope='module')
def browser():
    """A headless browser. Playwright keeps an event loop in this thread, so it must end before tests that start one."""
    if not find_browser():
        pytest.skip('Chromium or Chrome is not installed; install one of them to run this test')
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright runs this test')
    playwright.expect.set_options(timeout=PATIENCE_MS)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class PageLog:
    """The console messages and errors, the requested addresses and the dialogs of a page."""

    messages: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def watch(self, page) -> None:
        """Record the events of `page`."""

        def dismiss(dialog) -> None:
            self.dialogs.append(dialog.message)
            dialog.dismiss()

        page.on('console', lambda message: self.messages.append(message.text))
        page.on('pageerror', lambda error: self.messages.append(str(error)))
        page.on('request', lambda request: self.urls.append(request.url))
        page.on('dialog', dismiss)


@pytest.fixture
def open_page(browser):
    """Open a page of this width and color scheme in a context of its own: `open_page(width, scheme, **options)`."""
    contexts = []

    def open_page(width: int = 1280, scheme: str = 'light', **options):
        context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme, **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        return context.new_page()

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def log() -> PageLog:
    return PageLog()


APPEARANCES = [
    pytest.param(1280, 'light'),
    pytest.param(390, 'dark'),
    pytest.param(1280, 'dark', marks=pytest.mark.slow),
    pytest.param(390, 'light', marks=pytest.mark.slow),
]
"""Widths in pixels and color schemes of a desktop and a phone."""


def pytest_generate_tests(metafunc) -> None:
    if {'width', 'scheme'} <= set(metafunc.fixturenames):
        metafunc.parametrize(('width', 'scheme'), APPEARANCES)
