"""The page of `predict --html` in a browser: it fits, filters and orders without scripts, and shows maps on demand."""

import numpy as np
import pytest
from oddnames import copy_with_odd_names
from PIL import Image
from servedpages import assert_page_is_whole

from cxr_fastai.inference.tables import predict_to_table
from cxr_fastai.publishing import save_prediction_page

SHOWN = """() => [...document.querySelectorAll('main > .entries > .entry')]
    .filter(entry => entry.offsetParent).sort((a, b) => a.offsetTop - b.offsetTop || a.offsetLeft - b.offsetLeft)
    .map(entry => [entry.querySelector('.decision').textContent, entry.querySelector('.score').textContent])"""


@pytest.fixture(scope='module')
def predictions(evaluated, images, tmp_path_factory):
    """Predictions, with a threshold between them, of images, also with odd names, and of two that get no prediction."""
    folder = tmp_path_factory.mktemp('odd')
    paths = sorted((images / 'test').rglob('*.jpeg'))
    copy_with_odd_names(paths[0], folder)
    (folder / ('a_long_name_' * 12 + '.png')).write_bytes(b'')
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(folder / ('x' * 120 + '.png'))
    paths += sorted(path for path in folder.rglob('*') if path.is_file())
    scores = [row['p_pneumonia'] for row in predict_to_table(evaluated.path, paths).rows if row['status'] == 'ok']
    return predict_to_table(evaluated.path, paths, threshold=float(np.median(np.unique(scores))), engine='torch'), paths


@pytest.fixture(scope='module')
def address(predictions, tmp_path_factory) -> str:
    return save_prediction_page(*predictions, tmp_path_factory.mktemp('page') / 'p.html', 'run', maps=True).as_uri()


def test_the_page_is_complete_and_fits(open_page, log, address, width, scheme):
    assert_page_is_whole(open_page(width, scheme), log, address, width)


def test_images_are_filtered_and_ordered(open_page, address, predictions):
    page = open_page()
    page.goto(address)
    result, _ = predictions
    scored = [row for row in result.rows if row['status'] == 'ok']
    expected = [[row['prediction'], f'p(pneumonia) {row["p_pneumonia"]:.3f}'] for row in scored]
    assert page.evaluate(SHOWN) == [
        entry
        for _, _, entry in sorted(
            (-row['p_pneumonia'], index, entry) for index, (row, entry) in enumerate(zip(scored, expected, strict=True))
        )
    ]
    page.get_by_label('as in the list of files').check()
    assert page.evaluate(SHOWN) == expected
    for label in ('NORMAL', 'PNEUMONIA'):
        page.get_by_label(label, exact=True).check()
        assert page.evaluate(SHOWN) == [entry for entry in expected if entry[0] == label] != []
    page.get_by_label('all', exact=True).check()
    page.get_by_label('nearest to the threshold').check()
    distances = sorted(abs(row['p_pneumonia'] - result.predictor.threshold) for row in scored)
    first = float(page.evaluate(SHOWN)[0][1].split()[-1])
    assert abs(first - result.predictor.threshold) == pytest.approx(distances[0], abs=1e-3)


def test_maps_are_shown_on_demand(open_page, address):
    page = open_page()
    page.goto(address)
    maps = page.locator('.map')
    assert maps.count() > 0 and not maps.first.is_visible()
    page.get_by_label('show map').first.check()
    assert [maps.nth(index).is_visible() for index in (0, 1)] == [True, False]
    page.get_by_label('show all maps').check()
    assert maps.last.is_visible()
