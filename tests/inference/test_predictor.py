"""A row an image, in order; a bad image stops nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_fastai.core.errors import UsageError
from cxr_fastai.data.find import list_images
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import COLUMNS, Predictor, prediction_table
from cxr_fastai.models.architectures import build_model


@pytest.fixture(scope='module')
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(TorchEngine(build_model('baseline')), ModelConfig('baseline', size=48, threshold=0.5))


@pytest.fixture(scope='module')
def paths(images):
    return list_images([images / 'test'])


def test_order_and_repeats_are_kept_and_the_batch_size_changes_nothing(predictor, paths):
    asked = [paths[3], paths[0], paths[3], *paths]
    tables = [prediction_table(predictor.predict(asked, batch_size)) for batch_size in (1, 4, 64)]
    assert all(table.path.to_list() == [str(path) for path in asked] for table in tables)
    for table in tables[1:]:
        assert np.allclose(table.p_pneumonia, tables[0].p_pneumonia, rtol=0, atol=1e-6)


def test_a_bad_image_gets_its_row_and_the_others_their_probability(predictor, paths, tmp_path):
    (tmp_path / 'bad.jpeg').write_bytes(b'')
    table = prediction_table(predictor.predict([paths[0], tmp_path / 'bad.jpeg', paths[1]]))
    assert list(table) == list(COLUMNS) and table.status.to_list() == ['ok', 'error', 'ok']
    assert table.code[1] == 'E_EMPTY'
    assert table.message[1] == 'E_EMPTY: the file is empty' and np.isnan(table.p_pneumonia[1])
    alone = prediction_table(predictor.predict(paths[:2]))
    assert np.allclose(table.p_pneumonia[[0, 2]], alone.p_pneumonia, rtol=0, atol=1e-6)


def test_images_are_decoded_for_prediction_as_for_training(tmp_path):
    torch.manual_seed(0)
    predictor = Predictor(TorchEngine(build_model('baseline')), ModelConfig('baseline', 48, 0.5, resize='crop'))
    noise = np.random.default_rng(0).integers(0, 256, (900, 700), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'large.jpeg')
    wanted, whole = Preprocessing(48, 'crop'), read_image(tmp_path / 'large.jpeg')
    seen = wanted.load(tmp_path / 'large.jpeg')
    assert not np.array_equal(seen, wanted.fit(whole))  # decoded smaller, which makes a difference here
    (row,) = predictor.predict([tmp_path / 'large.jpeg'])
    assert row['p_pneumonia'] == predictor.scores(seen[None].copy())[0]


def test_an_image_that_disappears_after_the_search_gets_its_row(predictor, images, tmp_path):
    import shutil

    shutil.copytree(images / 'test/NORMAL', tmp_path / 'in')
    found = list_images([tmp_path / 'in'])
    found[1].unlink()
    found[2].write_bytes(b'')
    table = prediction_table(predictor.predict(found))
    assert table.code[:4].fillna('').to_list() == ['', 'E_IO', 'E_EMPTY', '']


def test_nothing_but_bad_images_is_no_crash(predictor, tmp_path):
    table = prediction_table(predictor.predict([tmp_path / 'missing.jpeg']))
    assert table.code.to_list() == ['E_IO']


def test_the_threshold_decides(paths):
    torch.manual_seed(0)
    engine = TorchEngine(build_model('baseline'))
    score = engine(Preprocessing(48).load(paths[0])[None])[0][0]
    for threshold, called in ((score, 'PNEUMONIA'), (np.nextafter(score, 1), 'NORMAL')):
        (row,) = Predictor(engine, ModelConfig('baseline', 48, float(threshold))).predict([paths[0]])
        assert row['prediction'] == called and row['threshold'] == threshold


def test_folders_are_searched_and_empty_ones_refused(images, paths, tmp_path):
    assert list_images([paths[0], images / 'test']) == [paths[0], *sorted(paths)]
    with pytest.raises(UsageError, match='no images found'):
        list_images([tmp_path])
