"""One headless browser and one service for all tests of a file, and a record of what the pages print and request."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servedpages import RequestRecorder

from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.publishing.printing import find_browser

PATIENCE_MS = 60_000
"""Time limit for anything that a page does, in milliseconds, on a busy machine."""
HTTP_ERROR = 'Failed to load resource'
"""What a browser prints for every response with a status of 400 or above."""
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


@pytest.fixture(scope='module')
def recorder(bundle):
    """A server that is ready and keeps the bodies of requests; `recorder.url` is its address."""
    for module in ('fastapi', 'hypercorn', 'python_multipart', 'prometheus_client', 'onnxruntime'):
        pytest.importorskip(module, reason='pip install "cxr_fastai[serve]" runs this test')
    from services import running_server

    from cxr_fastai.serving.app import Settings
    from cxr_fastai.serving.server import Server

    server = Server(Settings(bundle, port=0, drain_seconds=1))
    server.app = recorder = RequestRecorder(server.app)
    recorder.url = server.url
    with running_server(server):
        yield recorder


@pytest.fixture(scope='module')
def address(recorder) -> str:
    return recorder.url


@pytest.fixture
def page(open_page, log):
    """A page that must run without errors, dialogs, violations of its policy and requests to other sites."""
    page = open_page()
    log.watch(page)
    yield page
    assert log.messages == [] and log.dialogs == []
    assert all(url.startswith(('http://127.0.0.1:', 'data:image/', 'blob:http://127.0.0.1:')) for url in log.urls)


@pytest.fixture
def failing_page(page, log):
    """The same, where error responses are part of the test."""
    yield page
    log.messages = [message for message in log.messages if HTTP_ERROR not in message]


@pytest.fixture(scope='module')
def rows(bundle, images) -> dict[Path, dict]:
    """The rows of the Predictor for the test images, by path."""
    paths = sorted((images / 'test').rglob('*.jpeg'))
    return dict(zip(paths, Predictor.load(bundle, engine='onnx').predict(paths), strict=True))


@pytest.fixture(scope='module')
def pneumonia(bundle, rows) -> Path:
    """An image that is classified as pneumonia and has a map."""
    from cxr_fastai.serving.service import Service

    service = Service.open(bundle)
    for path, row in rows.items():
        if row['prediction'] == 'PNEUMONIA' and service.explain(path.read_bytes())['explanation']['overlay']:
            return path
    pytest.fail('no image has a map')


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
