"""The option `--modality`: images of other modalities in every command that reads images of users."""

import json
import shutil
from pathlib import Path

import pytest
from commandlines import small_training
from imagefiles import dicom

from cxr_fastai.cli import main
from cxr_fastai.core.run import Run
from cxr_fastai.images.cache import find_cache
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.serving import server
from cxr_fastai.serving.app import Settings
from cxr_fastai.serving.service import Service

DIGITISED = dicom(Modality='RG')


@pytest.fixture
def digitised(tmp_path) -> Path:
    """The file of a digitised radiograph."""
    path = tmp_path / 'digitised.dcm'
    path.write_bytes(DIGITISED)
    return path


@pytest.fixture
def mixed(images, tmp_path) -> Path:
    """A folder of images with a digitised radiograph in each split."""
    folder = Path(shutil.copytree(images, tmp_path / 'mixed'))
    for split in ('train', 'val', 'test'):
        (folder / split / 'NORMAL/00.dcm').write_bytes(DIGITISED)
    return folder


def test_predict_reads_other_modalities_only_if_they_are_named(bundle, digitised, tmp_path):
    argv = ['predict', str(bundle), str(digitised), '--no-gate', '--out']
    assert main([*argv, str(tmp_path / 'a.json')]) == 3
    assert main([*argv, str(tmp_path / 'b.json'), '--modality', 'CT,RG']) == 0
    (refused,), (read,) = (json.loads((tmp_path / name).read_text()) for name in ('a.json', 'b.json'))
    assert refused['code'] == 'E_DICOM_MODALITY' and '--modality RG accepts it too' in refused['message']
    assert read['status'] == 'ok' and 0 <= read['p_pneumonia'] <= 1


def test_maps_are_drawn_of_an_accepted_modality(bundle, run, digitised, tmp_path):
    table = ['--out', str(tmp_path / 'p.csv'), '--explain', '--no-gate']
    assert main(['predict', str(bundle), str(digitised), *table, '--modality', 'RG']) == 0
    assert [path.name for path in (tmp_path / 'p_maps').iterdir()] == ['0001.png']
    assert main(['explain', str(run.path), str(digitised), '--out', str(tmp_path / 'a'), '--modality', 'RG']) == 0
    assert main(['explain', str(run.path), str(digitised), '--out', str(tmp_path / 'b')]) == 3


@pytest.mark.parametrize('command', ['predict', 'explain', 'data audit', 'data prepare', 'train', 'serve'])
def test_a_wrong_modality_is_a_usage_error(fails, bundle, run, images, digitised, tmp_path, monkeypatch, command):
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))
    arguments = {
        'predict': ['predict', bundle, digitised],
        'explain': ['explain', run.path, digitised, '--out', tmp_path / 'maps'],
        'data audit': ['data', 'audit', images, '--out', tmp_path / 'audit'],
        'data prepare': ['data', 'prepare', images, '--size', '64'],
        'train': small_training(images, tmp_path / 'run'),
        'serve': ['serve', bundle],
    }
    fails([*arguments[command], '--modality', 'ct'], 2, "--modality 'ct': not DICOM modalities. Give their codes")
    assert [path.name for path in tmp_path.iterdir()] == ['digitised.dcm']


def test_the_modalities_of_a_split_are_those_of_the_training(fails, run, tmp_path):
    argv = ['explain', run.path, '--top-losses', 3, '--out', tmp_path / 'maps', '--modality', 'RG']
    fails(argv, 2, '--modality RG: images of a split are read as in the training')


def test_the_audit_accepts_other_modalities(mixed, tmp_path):
    assert main(['data', 'audit', str(mixed), '--out', str(tmp_path / 'a')]) == 1
    assert main(['data', 'audit', str(mixed), '--out', str(tmp_path / 'b'), '--modality', 'RG']) == 1
    strict, lenient = (json.loads((tmp_path / name / 'audit.json').read_text())['findings'] for name in 'ab')
    assert any('unusable' in finding['name'] for finding in strict)
    assert not any('unusable' in finding['name'] for finding in lenient)


def test_prepared_images_of_other_modalities_are_used_only_if_they_are_accepted(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))
    argv = ['data', 'prepare', str(mixed), '--size', '64']
    assert main(argv) == 3
    assert main([*argv, '--modality', 'RG']) == 0
    image = mixed / 'train/NORMAL/00.dcm'
    assert image in find_cache(mixed, Preprocessing(64, modality='RG'))
    assert image not in find_cache(mixed, Preprocessing(64))


def test_a_model_accepts_the_modalities_of_its_training(fails, mixed, digitised, tmp_path):
    argv = small_training(mixed, tmp_path / 'run')
    fails(argv, 1, 'E_DICOM_MODALITY: modality RG')
    assert main([*argv, '--modality', 'RG']) == 0
    assert Run.open(tmp_path / 'run').recipe.modality == 'RG'
    assert main(['evaluate', str(tmp_path / 'run')]) == 0
    predictor = Predictor.load(tmp_path / 'run')
    assert [row['status'] for row in predictor.predict([digitised])] == ['ok']
    assert Predictor.load(tmp_path / 'run', modality='CT').preprocessing.modality == 'RG,CT'


def test_the_service_accepts_other_modalities(bundle, tmp_path, monkeypatch):
    settings: list[Settings] = []
    monkeypatch.setattr(server, 'serve', lambda chosen, _: settings.append(chosen))
    assert main(['serve', str(bundle), '--modality', 'RG']) == 0
    assert settings[0].modality == 'RG'
    assert Service.open(bundle).explain(DIGITISED)['code'] == 'E_DICOM_MODALITY'
    assert Service.open(bundle, modality='RG').explain(DIGITISED)['code'] != 'E_DICOM_MODALITY'
