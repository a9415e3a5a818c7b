"""The predictor gives a row for each image, in order; an image that cannot be used does not stop the others."""

import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from imagefiles import DEEP, GREY, dicom
from PIL import Image
from runfiles import seal_results
from safetensors.numpy import load

from cxr_fastai.core.errors import CXRError, CXRWarning, ImageError, UsageError
from cxr_fastai.core.files import write_json
from cxr_fastai.core.run import Run
from cxr_fastai.data.find import list_images
from cxr_fastai.images.decode import read_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig, sha256
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.engines import TorchEngine
from cxr_fastai.inference.predictor import COLUMNS, Predictor, prediction_table
from cxr_fastai.inference.tensors import tensor_bytes
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


def test_every_kind_of_image_gets_the_row_of_its_file(predictor, paths):
    (expected,) = predictor.predict(paths[:1])
    array = read_image(paths[0])
    images = [str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), array, np.stack([array] * 3, axis=2)]
    table = prediction_table(predictor.predict(images))
    assert table.path.to_list() == [str(paths[0]), 'image-2', 'image-3', 'image-4', 'image-5']
    assert table.status.to_list() == ['ok'] * 5
    assert np.allclose(table.p_pneumonia, expected['p_pneumonia'], rtol=0, atol=1e-6)
    batch = prediction_table(predictor.predict(np.stack([array, array[::-1]])))
    assert batch.path.to_list() == ['image-1', 'image-2']
    assert np.isclose(batch.p_pneumonia[0], expected['p_pneumonia'], rtol=0, atol=1e-6)


def test_the_same_opened_image_can_be_predicted_many_times(predictor, paths):
    table = prediction_table(predictor.predict([Image.open(paths[0])] * 20, workers=8))
    assert table.status.to_list() == ['ok'] * 20 and np.ptp(table.p_pneumonia) < 1e-6


def test_the_notes_of_images_in_memory_are_in_their_rows(predictor):
    rows = list(predictor.predict([dicom(), Image.fromarray(DEEP)]))
    assert all('window 1014 to 3985' in row['message'] for row in rows)


def test_a_wrong_array_gets_a_row_and_does_not_change_the_others(predictor, paths):
    array = read_image(paths[0])
    refused = {
        'float32': (np.float32(array / 255), 'E_ARRAY'),
        'float64': (array.astype(float), 'E_ARRAY'),
        'uint16': (DEEP, 'E_ARRAY'),
        'int16': (np.int16(DEEP), 'E_ARRAY'),
        'bool': (array > 100, 'E_ARRAY'),
        '3 h w': (np.stack([array] * 3), 'E_ARRAY'),
        'n h w': (np.stack([array] * 5), 'E_ARRAY'),
        'colour': (np.dstack([array, array[::-1], array]), 'E_ARRAY'),
        'RGBA': (np.dstack([array] * 4), 'E_ARRAY'),
        'a number': (np.array(3, np.uint8), 'E_ARRAY'),
        'objects': (array.astype(object), 'E_ARRAY'),
        'a tensor': (torch.rand(3, 96, 96), 'E_ARRAY'),
        'None': (None, 'E_TYPE'),
        'no file': (b'<html>', 'E_FORMAT'),
    }
    images = [image for image, _ in refused.values()]
    table = prediction_table(predictor.predict([paths[0], *images, array]))
    errors = table[1:-1]
    assert errors.status.to_list() == ['error'] * len(refused) and errors.p_pneumonia.isna().all()
    assert errors.code.to_list() == [code for _, code in refused.values()]
    assert all(row.message.startswith(f'{row.code}: ') and len(row.message) < 200 for row in errors.itertuples())
    (expected,) = predictor.predict(paths[:1])
    assert np.allclose(table.p_pneumonia.iloc[[0, -1]], expected['p_pneumonia'], rtol=0, atol=1e-6)


def test_images_that_show_nothing_are_rejected_in_memory_too(predictor):
    blank = np.zeros((96, 80), np.uint8)
    table = prediction_table(predictor.predict([blank, Image.fromarray(blank), GREY[:40], np.zeros((0, 0), np.uint8)]))
    assert table.status.to_list() == ['rejected'] * 4
    assert table.code.to_list() == ['E_BLANK', 'E_BLANK', 'E_TOO_SMALL', 'E_TOO_SMALL']


@pytest.mark.parametrize('image', ['a.jpeg', b'', GREY, Image.fromarray(GREY)], ids=['path', 'bytes', 'array', 'PIL'])
def test_a_single_image_instead_of_a_list_is_refused(predictor, image):
    with pytest.raises(UsageError, match=r'a list of images is needed. Pass \[image\]'):
        predictor.predict(image)


def test_scores_are_only_of_the_view_of_the_network(predictor):
    squares = np.stack([Preprocessing(48).fit(GREY)] * 2)
    assert predictor.scores(squares).shape == (2,)
    for images in (squares / 255, squares.astype(np.uint16), squares[0], squares[:, None], squares[:, :40, :40]):
        for score in (predictor.scores, predictor.infer):
            with pytest.raises(ImageError, match=r'the network needs a uint8 array \(n, 48, 48\)') as caught:
                score(images)
            assert caught.value.code == 'E_ARRAY'


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
    (expected,) = Predictor.load(str(evaluated.path)).predict(paths[:1])
    assert row == expected
    assert run.metrics['test']['model'] == sha256(run / 'model.safetensors')


def test_a_decision_for_another_network_is_not_used(evaluated, tmp_path):
    run = Run(shutil.copytree(evaluated.path, tmp_path / 'run'))
    decision = Decision.from_run(run, run.decision['model'])
    write_json(run / 'decision.json', asdict(replace(decision, model='0' * 64, threshold=0.123)))
    seal_results(run.path)
    with pytest.warns(CXRWarning, match='made for another network'):
        predictor = Predictor.load(run.path)
    assert predictor.threshold == run.recipe.threshold


def test_the_learner_in_a_run_classifies_as_its_run(evaluated, paths, tmp_path):
    run = Run(shutil.copytree(evaluated.path, tmp_path / 'run'))
    folder, file = (Predictor.load(path) for path in (run.path, run / 'learner.pkl'))
    assert file.config == folder.config and file.config.threshold_rule == run.decision['rule']
    assert list(file.predict(paths)) == list(folder.predict(paths))
    (run / 'model.safetensors').unlink()
    with pytest.warns(CXRWarning, match='made for another network'):  # the decision names the missing file
        Predictor.load(run / 'learner.pkl')


def test_a_learner_elsewhere_keeps_its_own_threshold(evaluated, tmp_path):
    shutil.copy(evaluated / 'learner.pkl', tmp_path)
    config = Predictor.load(tmp_path / 'learner.pkl').config
    assert (config.threshold, config.threshold_rule) == (0.5, 'fixed:0.5')


def test_the_learner_of_another_network_in_a_run_keeps_its_own_threshold(evaluated, tmp_path):
    run = Run(shutil.copytree(evaluated.path, tmp_path / 'run'))
    weights = load((run / 'model.safetensors').read_bytes())
    name = next(iter(weights))
    (run / 'model.safetensors').write_bytes(tensor_bytes(weights | {name: weights[name] + 1}))
    with pytest.warns(CXRWarning, match=r'learner.pkl is not the network of the run .*, so its own threshold 0.5'):
        assert Predictor.load(run / 'learner.pkl').threshold == 0.5
