"""The report in a real browser: nothing from outside, no error, nothing beyond a phone's edge, and names stay text."""

import shutil

import pytest

from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.figures import worst_errors
from cxr_fastai.publishing.reporting import find_browser, report

SCRIPT = '<script>alert(1)</script>.jpeg'
pytestmark = pytest.mark.skipif(not find_browser(), reason='no Chromium or Chrome here')


@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=find_browser(),
            args=['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update'],
        )
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def address(evaluated, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('browser') / 'run'
    shutil.copytree(evaluated.path, folder)
    run = Run(folder)
    worst = worst_errors(run.predicted('test')).path.iloc[0]
    table = run.predictions
    table.assign(path=table.path.replace(worst, 'test/NORMAL/' + SCRIPT)).to_csv(run / 'predictions.csv', index=False)
    return report(run).as_uri()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 390])
def test_the_report_in_a_browser(browser, address, width, scheme):
    context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme)
    page, said, asked, dialogs = context.new_page(), [], [], []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(str(error)))
    page.on('request', lambda request: asked.append(request.url))
    page.on('dialog', lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    assert said == [] and dialogs == []
    assert [url for url in asked if not url.startswith('data:image/')] == [address]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert SCRIPT in page.locator('main').inner_text().replace('\n', '')
    assert page.locator('script').count() == 0
    assert page.evaluate('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
    assert (
        contrast(
            *page.evaluate("""() => {
        const colour = node => getComputedStyle(node)[node.tagName === 'BODY' ? 'backgroundColor' : 'fill'];
        return [colour(document.body), colour(document.querySelector('svg text'))]; }""")
        )
        > 7
    )
    context.close()


def contrast(*colours: str) -> float:
    """The contrast ratio of two colours, rgb(r, g, b), as the accessibility guidelines (WCAG 2) define it."""
    lights = []
    for colour in colours:
        shares = [int(part) / 255 for part in colour[4:-1].split(',')]
        linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        lights.append(sum(weight * light for weight, light in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
