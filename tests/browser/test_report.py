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

SPLIT_WORDS = """() => {
    const split = [];
    const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode;
        if (node.parentElement.closest('svg, figcaption, .facts')) continue;
        for (const word of node.data.matchAll(/[^\\s\\/_-]+/g)) {
            const range = document.createRange();
            range.setStart(node, word.index);
            range.setEnd(node, word.index + word[0].length);
            if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) split.push(word[0]);
        }
    }
    return split;
}"""
"""The words that are broken within; names of files and hashes may be."""
COLUMNS = "getComputedStyle(document.querySelector('.tiles')).gridTemplateColumns.split(' ').length"


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
    assert page.evaluate(SPLIT_WORDS) == [] and page.evaluate(COLUMNS) == (4 if width > 1000 else 2)


def test_wide_tables_scroll_by_keyboard_and_keep_their_headers_in_print(open_page, address):
    page = open_page(390)
    page.goto(address)
    regions = page.locator('.scroll')
    assert regions.count() > 5 and page.locator('.scroll:not([tabindex="0"][aria-label])').count() == 0
    assert page.locator('.scroll table:not(.facts):not(:has(thead))').count() == 0
    wide = page.get_by_role('region', name='Thresholds')
    assert wide.evaluate('region => region.scrollWidth > region.clientWidth')
    wide.focus()
    page.keyboard.press('ArrowRight')
    has_scrolled = """region => region.scrollLeft > 0 || new Promise(
        done => region.addEventListener('scroll', () => done(region.scrollLeft > 0), {once: true})
    )"""
    assert wide.evaluate(has_scrolled)


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
