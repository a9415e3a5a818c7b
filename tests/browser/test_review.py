"""The page of a label review in a browser loads nothing from elsewhere, and fits a phone."""

import shutil

import pytest
from servedpages import assert_page_is_whole

from cxr_fastai.evaluation.label_review import review_labels
from cxr_fastai.publishing.review_page import save_review


@pytest.fixture(scope='module')
def address(folds_with_a_copy, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('review') / 'folds'
    shutil.copytree(folds_with_a_copy.path, folder)
    return save_review(review_labels(folder), folder).as_uri()


def test_the_page_is_complete_and_fits(open_page, log, address, width, scheme):
    assert_page_is_whole(open_page(width, scheme), log, address, width)
