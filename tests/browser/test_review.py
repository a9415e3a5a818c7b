"""The page of a label review in a browser loads nothing from elsewhere, and fits a phone."""

import shutil

import pytest

from cxr_fastai.evaluation.label_review import review_labels
from cxr_fastai.publishing.review_page import save_review

CLIPPED = """() => [...document.querySelectorAll('.entry, .tile, .notice, h1, p')].filter(
    element => element.scrollWidth > element.clientWidth + 1).length"""


@pytest.fixture(scope='module')
def address(folds_with_a_copy, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('review') / 'folds'
    shutil.copytree(folds_with_a_copy.path, folder)
    return save_review(review_labels(folder), folder).as_uri()


def test_the_page_is_complete_and_fits(open_page, log, address, width, scheme):
    page = open_page(width, scheme)
    log.watch(page)
    page.goto(address)
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function('[...document.images].every(image => image.complete && image.naturalWidth > 0)')
    assert log.messages == [] and log.dialogs == []
    assert [url for url in log.urls if not url.startswith('data:image/')] == [address]
    assert page.evaluate('document.documentElement.scrollWidth') <= width and page.evaluate(CLIPPED) == 0
