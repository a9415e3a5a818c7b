"""The predictor gives a row for each image, in order; an image that cannot be used does not stop the others."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.find import list_images
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig, sha256
from cxr_fastai.inference.decision import Decision
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


def test_rows_are_in_the_order_of_the_images_for_every_batch_size(predictor, paths):
    repeated = [paths[3], paths[0], paths[3], *paths]
    tables = [prediction_table(predictor.predict(repeated, batch_size)) for batch_size in (1, 4, 64)]
    assert all(table.path.to_list() == [str(path) for path in repeated] for table in tables)
    for table in tables[1:]:
        assert np.allclose(table.p_pneumonia, tables[0].p_pneumonia, rtol=0, atol=1e-6)


def test_an_unreadable_image_gets_a_row_and_does_not_change_the_others(predictor, paths, tmp_path):
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
    preprocessing, whole = Preprocessing(48, 'crop'), read_image(tmp_path / 'large.jpeg')
    square = preprocessing.load(tmp_path / 'large.jpeg')
    assert not np.array_equal(square, preprocessing.fit(whole))  # the decoder reduces it, which changes pixels
    (row,) = predictor.predict([tmp_path / 'large.jpeg'])
    assert row['p_pneumonia'] == predictor.scores(square[None].copy())[0]


def test_an_image_that_is_deleted_after_the_search_gets_a_row(predictor, images, tmp_path):
    shutil.copytree(images / 'test/NORMAL', tmp_path / 'in')
    paths = list_images([tmp_path / 'in'])
    paths[1].unlink()
    paths[2].write_bytes(b'')
    table = prediction_table(predictor.predict(paths))
    assert table.code[:4].fillna('').to_list() == ['', 'E_IO', 'E_EMPTY', '']


def test_a_batch_without_a_readable_image_gets_rows(predictor, tmp_path):
    table = prediction_table(predictor.predict([tmp_path / 'missing.jpeg']))
    assert table.code.to_list() == ['E_IO']


def test_a_probability_at_the_threshold_is_classified_as_pneumonia(paths):
    torch.manual_seed(0)
    engine = TorchEngine(build_model('baseline'))
    score = engine(Preprocessing(48).load(paths[0])[None])[0][0]
    for threshold, label in ((score, 'PNEUMONIA'), (np.nextafter(score, 1), 'NORMAL')):
        (row,) = Predictor(engine, ModelConfig('baseline', 48, float(threshold))).predict([paths[0]])
        assert row['prediction'] == label and row['threshold'] == threshold


def test_folders_are_searched_and_empty_folders_are_refused(images, paths, tmp_path):
    assert list_images([paths[0], images / 'test']) == [paths[0], *sorted(paths)]
    with pytest.raises(UsageError, match='no images found'):
        list_images([tmp_path])


def test_nan_as_a_probability_is_an_error():
    def broken(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(images), np.nan), np.zeros((len(images), 2))

    predictor = Predictor(broken, ModelConfig('baseline', 48, 0.5))
    with pytest.raises(CXRError, match='the model is damaged'):
        predictor.scores(np.zeros((1, 48, 48), np.uint8))


def test_maps_need_the_torch_engine(bundle):
    with pytest.raises(UsageError, match='maps need the torch network'):
        _ = Predictor.load(bundle, engine='onnx').model


def test_a_run_can_be_loaded_without_its_pickle(evaluated, paths, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'none.json'))
    run = Run(shutil.copytree(evaluated.path, tmp_path / 'run'))
    (run / 'learner.pkl').unlink()
    (row,) = Predictor.load(run.path).predict(paths[:1])
    (expected,) = Predictor.load(evaluated.path).predict(paths[:1])
    assert row == expected
    assert run.metrics['test']['model'] == sha256(run / 'model.safetensors')


def test_a_decision_for_another_network_is_not_used(evaluated, tmp_path):
    run = Run(shutil.copytree(evaluated.path, tmp_path / 'run'))
    decision = Decision.from_run(run, run.decision['model'])
    replace(decision, model='0' * 64, threshold=0.123).save(run)
    with pytest.warns(CXRWarning, match='made for another network'):
        predictor = Predictor.load(run.path)
    assert predictor.threshold == run.recipe.threshold
