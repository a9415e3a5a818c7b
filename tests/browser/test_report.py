"""The report in a browser loads nothing from elsewhere, fits a phone, is readable, and shows file names as text."""

import shutil

import pytest
from runfiles import seal_results

from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.figures import worst_errors
from cxr_fastai.publishing.reporting import report

SCRIPT = '<script>alert(1)</script>.jpeg'
READ_COLORS = """() => [
    getComputedStyle(document.body).backgroundColor,
    getComputedStyle(document.querySelector('svg text')).fill,
]"""


@pytest.fixture(scope='module')
def address(evaluated, tmp_path_factory) -> str:
    """The address of a report in which the name of an image is a script."""
    folder = tmp_path_factory.mktemp('report') / 'run'
    shutil.copytree(evaluated.path, folder)
    run = Run(folder)
    worst = worst_errors(run.predicted('test')).path.iloc[0]
    table = run.predictions
    table = table.assign(path=table.path.replace(worst, f'test/NORMAL/{SCRIPT}'))
    table.to_csv(run / 'predictions.csv', index=False)
    seal_results(run.path)
    return report(run).as_uri()


def test_the_report_is_complete_readable_and_safe(open_page, log, address, width, scheme):
    page = open_page(width, scheme)
    log.watch(page)
    page.goto(address)
    assert log.messages == [] and log.dialogs == []
    assert [url for url in log.urls if not url.startswith('data:image/')] == [address]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert SCRIPT in page.locator('main').inner_text().replace('\n', '')
    assert page.locator('script').count() == 0
    assert page.evaluate('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
    assert contrast(*page.evaluate(READ_COLORS)) > 7


def contrast(color: str, other: str) -> float:
    """The contrast ratio of two colors, `rgb(r, g, b)`, by the definition of WCAG 2."""
    darker, lighter = sorted([luminance(color), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """The relative luminance of a color, `rgb(r, g, b)`, by the definition of WCAG 2."""
    total = 0.0
    for part, weight in zip(color[4:-1].split(','), (0.2126, 0.7152, 0.0722), strict=True):
        share = int(part) / 255
        linear = share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total
