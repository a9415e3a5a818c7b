"""The page of `predict --html` is self-contained, shows each prediction once, and groups the failures by reason."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from imagefiles import dicom
from oddnames import FILES, copy_with_odd_names
from PIL import Image

from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.tables import Predictions, predict_to_table
from cxr_fastai.interpretation.explainer import Explainer, Subject
from cxr_fastai.interpretation.overlays import blend
from cxr_fastai.publishing import save_prediction_page
from cxr_fastai.publishing.thumbnails import MAP_SIZE, PICTURE_SIZE, compress, compress_map


@pytest.fixture(scope='module')
def paths(images, tmp_path_factory) -> list[Path]:
    """Twelve images, and three that cannot be used."""
    folder = tmp_path_factory.mktemp('bad')
    for name in ('empty.png', 'also_empty.png'):
        (folder / name).write_bytes(b'')
    (folder / 'text.jpeg').write_text('no image')
    return [*sorted((images / 'test').rglob('*.jpeg')), *sorted(folder.iterdir())]


@pytest.fixture(scope='module')
def predictions(evaluated, paths) -> Predictions:
    return predict_to_table(evaluated.path, paths, engine='torch')


@pytest.fixture(scope='module')
def page(predictions, paths, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('page') / 'gallery.html'
    return save_prediction_page(predictions, paths, path, 'runs/mine', maps=True).read_text()


def text_of(page: str) -> str:
    """The text of a page without its style, in one line."""
    return re.sub(r'\s+', ' ', re.sub(r'<wbr>|<style>.*?</style>|<[^>]*>', '', page, flags=re.DOTALL))


def test_the_page_has_no_scripts_and_loads_nothing(page):
    assert "default-src 'none'" in page and '<script' not in page and '<link' not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/(?:jpeg|png);base64,|#failures)', page)


def test_each_prediction_is_shown_once_with_its_decision_probability_and_name(page, predictions):
    text = text_of(page)
    scored = [row for row in predictions.rows if row['status'] == 'ok']
    assert page.count('class="decision"') == len(scored) == 12
    for row in scored:
        shown_name = '/'.join(Path(row['path']).parts[-3:])
        assert text.count(f'{row["prediction"]} p(pneumonia) {row["p_pneumonia"]:.3f} {shown_name}') == 1
    assert f'probability of {predictions.predictor.threshold:.4g} or more' in text
    assert text.index('not a medical device') < text.index('p(pneumonia)') and 'Predictions of mine' in text


def test_the_highest_probability_is_first(page):
    shown = [float(p) for p in re.findall(r'p\(pneumonia\) ([\d.]+)', page)]
    assert shown == sorted(shown, reverse=True)


def test_images_without_a_prediction_are_grouped_by_reason(page):
    text = text_of(page)
    assert 'No prediction: 3 images, rejected or failed' in text
    assert 'E_EMPTY: 2 images' in text and 'E_FORMAT: 1 image' in text
    assert text.index('E_EMPTY: 2') < text.index('empty.png') < text.index('E_FORMAT: 1') < text.index('text.jpeg')
    assert text.count('the file is empty') == 1


def test_a_page_without_maps_says_nothing_of_them(predictions, paths, tmp_path):
    page = save_prediction_page(predictions, paths, tmp_path / 'p.html', 'm').read_text()
    assert page.count('<img') == 12 and 'data:image/png' not in page
    assert 'Grad-CAM' not in page and 'show map' not in page


def test_a_map_on_top_of_its_image_looks_like_the_map_of_explain(evaluated, paths):
    [explanation] = Explainer.load(evaluated.path).explain([Subject(paths[0])])
    layer = Image.open(BytesIO(compress_map(explanation.heat))).convert('RGBA')
    assert max(layer.size) <= MAP_SIZE
    pixels = np.asarray(layer.resize(explanation.image.shape[::-1]), float)
    alpha = pixels[..., 3:] / 255
    shown = explanation.image[..., None] * (1 - alpha) + pixels[..., :3] * alpha
    assert np.abs(shown - blend(explanation)).mean() < 2


def test_five_hundred_images_with_maps_stay_below_ten_megabytes():
    # A smooth picture with noise compresses to 8 kB, as large as the largest of 96 real ones.
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).resize((512, 512)), float)
    image = (smooth + rng.normal(0, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
    heat = np.asarray(Image.fromarray(rng.random((7, 7), np.float32)).resize((512, 512)))
    assert max(Image.open(BytesIO(compress(image))).size) == PICTURE_SIZE
    encoded = 4 / 3 * (len(compress(image)) + len(compress_map(heat)))
    assert len(compress(image)) > 8000 and 500 * (encoded + 1000) < 10e6


def test_an_image_that_may_show_a_name_has_no_picture(evaluated, tmp_path):
    path = tmp_path / 'named.dcm'
    path.write_bytes(dicom(BurnedInAnnotation='YES'))
    predictions = predict_to_table(evaluated.path, [path], engine='torch')
    page = save_prediction_page(predictions, [path], tmp_path / 'p.html', 'm', maps=True).read_text()
    assert predictions.rows[0]['status'] == 'ok' and '<img' not in page
    assert 'not shown: the file says that the image contains text' in page


def test_a_rejected_image_has_a_picture_but_no_decision(bundle, tmp_path):
    path = tmp_path / 'noise.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)).save(path)
    predictions = predict_to_table(bundle, [path])
    page = save_prediction_page(predictions, [path], tmp_path / 'p.html', 'm').read_text()
    assert 'E_OUT_OF_DISTRIBUTION: 1 image' in page and 'No image has a probability' in page
    assert page.count('<img') == 1 and 'p(pneumonia)' not in page


def test_names_are_text(evaluated, paths, tmp_path):
    folder = copy_with_odd_names(paths[0], tmp_path / 'odd')
    odd = sorted(path for path in folder.rglob('*') if path.is_file())
    page = save_prediction_page(
        predict_to_table(evaluated.path, odd, engine='torch'), odd, tmp_path / 'p.html', '"><script>alert(2)<'
    ).read_text()
    text = text_of(page)
    assert '<script' not in page and page.count('class="decision"') == len(FILES)
    assert not [char for char in page if char != '\n' and not char.isprintable()]
    for name in ('&lt;script&gt;alert(1)&lt;.jpeg', r'rtl\u202egpj.jpeg', r'new\nline.jpeg', r'bad\udcff\udcfe.jpeg'):
        assert name in text


def test_rows_of_a_resumed_table_give_the_same_page(evaluated, predictions, paths, page, tmp_path):
    table = tmp_path / 'p.csv'
    predict_to_table(evaluated.path, paths, table, engine='torch')
    resumed = predict_to_table(evaluated.path, paths, table, resume=True, engine='torch')
    assert isinstance(resumed.rows[0]['p_pneumonia'], str)
    assert save_prediction_page(resumed, paths, tmp_path / 'p.html', 'runs/mine', maps=True).read_text() == page


def test_of_very_many_images_the_highest_probabilities_are_shown(predictions, paths, tmp_path, monkeypatch):
    monkeypatch.setattr('cxr_fastai.publishing.prediction_page.MAX_SHOWN', 5)
    page = save_prediction_page(predictions, paths, tmp_path / 'p.html', 'm').read_text()
    assert page.count('class="decision"') == 5
    assert 'The 5 images with the highest probabilities are shown here, 7 are not.' in text_of(page)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [('p.csv', 'must end in .html'), ('no/p.html', 'does not exist'), ('old.html', 'exists already')],
)
def test_a_page_that_cannot_be_new_is_refused(tmp_path, evaluated, name, reason):
    (tmp_path / 'old.html').write_text('kept')
    predictions = Predictions([], Predictor.load(evaluated.path))
    with pytest.raises(UsageError, match=reason):
        save_prediction_page(predictions, [], tmp_path / name, 'm')
    assert (tmp_path / 'old.html').read_text() == 'kept' and len(list(tmp_path.iterdir())) == 1
