"""The page of a label review is self-contained, shows each image with its map, and replaces only its own files."""

import re
import shutil
from dataclasses import replace
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from imagefiles import dicom
from PIL import Image
from runfiles import COPY

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run_files import read_table
from cxr_fastai.evaluation.label_review import REVIEW_COLUMNS, LabelReview, review_labels
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.overlays import blend
from cxr_fastai.publishing.review_page import (
    Pictures,
    check_replaceable,
    draw_pictures,
    render,
    save_review,
)
from cxr_fastai.publishing.thumbnails import PICTURE_SIZE, compress

SCRIPT = '<script>alert(1)</script>.jpeg'


@pytest.fixture(scope='module')
def review(folds_with_a_copy, tmp_path_factory) -> LabelReview:
    """The review of a copy of these folds."""
    folder = tmp_path_factory.mktemp('review') / 'folds'
    shutil.copytree(folds_with_a_copy.path, folder)
    return review_labels(folder, top=5)


@pytest.fixture(scope='module')
def page(review) -> str:
    return save_review(review, review.series.path).read_text()


def test_the_page_has_no_scripts_and_loads_nothing(page):
    assert "default-src 'none'" in page and '<script' not in page and '<link' not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,|#)', page)


def test_every_listed_image_is_shown_with_its_score_label_name_and_fold(page, review):
    text = re.sub(r'<[^>]*>', '', page)
    text = re.sub(r'\s+', ' ', text)
    for row in review.table.itertuples():
        assert f'p(pneumonia) {row.p_pneumonia:.3f} · labelled {row.label} {row.path}' in text
        assert f'{row.reason}' in text and f'number {row.rank} · {row.fold}' in text
    assert page.count('class="entry"') == len(review.table) == 7
    assert page.count('<img') + page.count('no positive evidence for pneumonia</div>') == 2 * len(review.table)
    assert 'Nothing was changed' in text and 'a question and not a verdict' in text and 'Research software' in text


def test_the_table_has_the_same_rows(page, review):
    table = pd.read_csv(review.series.path / 'review.csv', keep_default_na=False)
    assert table.columns.to_list() == REVIEW_COLUMNS and table.path.to_list() == review.table.path.to_list()
    assert COPY in table.duplicate_of.to_list()


def test_no_label_is_changed(review, page, folds_with_a_copy):
    for fold in ('fold-0', 'fold-1'):
        assert (review.series.path / fold / 'items.csv').read_bytes() == (
            folds_with_a_copy.path / fold / 'items.csv'
        ).read_bytes()
    assert read_table(review.series.path / 'out_of_fold.csv').label.equals(review.predictions.label)


def test_a_map_is_that_of_the_network_that_did_not_train_on_the_image(review):
    row = review.table.iloc[0]
    overlay = draw_pictures(review)[row.path].overlay
    for fold in ('fold-0', 'fold-1'):
        explainer = Explainer.load(review.series.folder(fold))
        [explanation] = explainer.explain([Subject(review.root / row.path, p=row.p_pneumonia)])
        is_same = overlay == (None if explanation.is_empty else compress(blend(explanation)))
        assert is_same == (fold == row.fold)


def test_two_hundred_images_stay_below_ten_megabytes(page):
    pictures = re.findall(r'data:image/jpeg;base64,[^"]*', page)
    assert 2 * 200 * max(map(len, pictures)) < 10e6


def test_a_large_image_is_shown_as_a_small_picture():
    noise = np.random.default_rng(0).integers(0, 256, (512, 400, 3), dtype=np.uint8)
    assert max(Image.open(BytesIO(compress(noise))).size) == PICTURE_SIZE


def test_an_image_without_a_picture_and_a_map_without_evidence_say_so(review):
    path = review.table.path[0]
    image = BytesIO()
    Image.new('L', (8, 8)).save(image, 'JPEG')
    text = render(review, {path: Pictures(image.getvalue(), None)}, '0' * 64)
    assert text.count('no positive evidence for pneumonia</div>') == 1
    assert text.count('not shown: unreadable, or may show a name') == len(review.table) - 1


def test_an_image_that_may_show_a_name_is_listed_but_not_shown(review, tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(BurnedInAnnotation='YES'))
    table = review.table.head(1).assign(path='a.dcm')
    assert draw_pictures(replace(review, root=tmp_path, table=table)) == {}


def test_hidden_names_are_not_on_the_page(review):
    text = render(review, {}, '0' * 64, hide_names=True)
    for row in review.table.itertuples():
        assert row.path.split('/')[-1] not in text.replace('<wbr>', '') and row.patient not in text
    number = review.predictions.path.to_list().index(COPY) + 1
    assert f'image-{number}.jpeg' in text


def test_file_names_are_text(review):
    path = review.table.path[0]
    rename = {path: SCRIPT}
    renamed = replace(review, predictions=review.predictions.replace(rename), table=review.table.replace(rename))
    text = render(renamed, {}, '0' * 64)
    assert '<script' not in text and '&lt;script&gt;' in text


def test_a_review_replaces_its_own_files_but_no_others(review, tmp_path):
    page = save_review(review, tmp_path)
    save_review(replace(review, table=review.table[:2]), tmp_path)
    assert page.read_text().count('class="entry"') == 2
    table = tmp_path / 'review.csv'
    edited = table.read_text().replace('contradicts the label', 'the label is right')
    table.write_text(edited + '\n')
    with pytest.raises(UsageError, match=r'review.csv: was edited since'):
        save_review(review, tmp_path)
    assert table.read_text() == edited + '\n'
    table.unlink()
    page.write_text('<title>Reviews of restaurants</title>')
    with pytest.raises(UsageError, match=r'review.html: not a page of `data review`'):
        save_review(review, tmp_path)
    page.unlink()
    table.write_text('path,stars\n')
    with pytest.raises(UsageError, match='is of another program'):
        check_replaceable(tmp_path)
