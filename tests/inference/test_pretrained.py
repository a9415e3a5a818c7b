"""The name `pretrained` means the trained model of the package in every command that predicts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from services import running_app

from cxr_fastai.cli import main
from cxr_fastai.core import environment
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.inference import pretrained
from cxr_fastai.inference.benchmarking import find_settings
from cxr_fastai.inference.bundle import Bundle
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.pretrained import find_model, pretrained_facts
from cxr_fastai.inference.tables import predict_to_table
from cxr_fastai.serving.app import Settings
from cxr_fastai.serving.service import NO_WEIGHTS, Service

pytest.importorskip('onnxruntime', reason='needs pip install "cxr_fastai[onnx]"')


@pytest.fixture
def image(images) -> Path:
    return next((images / 'test').rglob('*.jpeg'))


def test_only_the_name_means_the_model_of_the_package(boxed):
    assert find_model('pretrained') == boxed
    for path in ('./pretrained', 'runs/pretrained', Path('pretrained'), Path('./pretrained'), str(boxed)):
        assert find_model(path) == Path(path)


def test_a_folder_of_this_name_is_named_by_a_path_and_a_warning_says_so(boxed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pretrained').mkdir()
    with pytest.warns(CXRWarning, match=r'The file or folder here is \./pretrained'):
        assert find_model('pretrained') == boxed


def test_python_functions_know_the_name(boxed, image, half_bundle):
    expected = [row['p_pneumonia'] for row in Predictor.load(half_bundle, gate=False).predict([image])]
    assert [row['p_pneumonia'] for row in Predictor.load('pretrained', gate=False).predict([image])] == expected
    assert [row['p_pneumonia'] for row in predict_to_table('pretrained', [image], use_gate=False).rows] == expected
    assert Bundle.open('pretrained').path == boxed


def test_predict_and_benchmark_know_the_name(boxed, image, capsys):
    assert main(['predict', 'pretrained', str(image), '--no-gate', '--json']) == 0
    document = json.loads(capsys.readouterr().out)
    assert document['model'] == 'pretrained' and 0 <= document['rows'][0]['p_pneumonia'] <= 1
    assert main(['benchmark', 'pretrained', '--json']) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row['engine'] for row in rows} == {'onnx'} and {row['largest_change'] for row in rows} == {0}
    assert [setting.engine for setting in find_settings(boxed)] == ['onnx']


def test_the_service_knows_the_name_and_says_why_it_has_no_maps(boxed, image):
    with running_app(Settings('pretrained')) as client:
        response = client.post('/v1/predict?explain=true', files=[('images', image.read_bytes())])
        assert client.get('/v1/model').json()['sha256'] == Bundle.open(boxed).identity
    (row,) = response.json()['images']
    assert row['explanation']['note'] == NO_WEIGHTS or row['status'] == 'rejected'
    assert row['explanation']['overlay'] is None and str(boxed) not in response.text


def test_a_map_of_the_service_names_no_path(boxed):
    with pytest.raises(UsageError, match=NO_WEIGHTS):
        _ = Service.open('pretrained').network


def test_explain_and_torch_are_clear_errors(boxed, image, capsys):
    predict = ['predict', 'pretrained', str(image)]
    for words in (['explain', 'pretrained', str(image)], [*predict, '--engine', 'torch'], [*predict, '--explain']):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert 'needs the weights for torch (model.safetensors), but pretrained has only model.onnx' in error
        assert 'Name a run of `cxr-fastai train`, or a bundle that `cxr-fastai export RUN` makes' in error


def test_messages_about_the_bundle_show_its_name_and_not_where_the_package_is(boxed, image, capsys):
    assert main(['predict', 'pretrained', str(image), '--tta']) == 2
    assert ' of pretrained was chosen' in capsys.readouterr().err
    (boxed / 'config.json').write_text('{}')
    assert main(['predict', 'pretrained', str(image)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: pretrained/config.json: does not match its hash') and str(boxed) not in error


@pytest.mark.parametrize('command', ['evaluate', 'report', 'export'])
@pytest.mark.parametrize('name', ['pretrained', 'hf:me/pneumonia'])
def test_commands_for_runs_say_that_the_model_is_a_bundle(command, name, capsys):
    assert main([command, name]) == 2
    assert f'{name}: a bundle, which has no training to work on' in capsys.readouterr().err


def test_a_package_without_a_model_is_a_clear_error(tmp_path, monkeypatch, image, capsys):
    monkeypatch.setattr(pretrained, 'FOLDER', tmp_path / 'none')
    monkeypatch.setattr(pretrained, 'FACTS', tmp_path / 'none.json')
    for words in (['predict', 'pretrained', str(image)], ['serve', 'pretrained'], ['benchmark', 'pretrained']):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert 'contains no trained model' in error and './pretrained' in error
    with pytest.raises(UsageError, match='contains no trained model'):
        pretrained_facts()


def test_without_onnx_runtime_the_error_names_the_extra(boxed, monkeypatch):
    monkeypatch.setattr(environment, 'is_installed', lambda name: name != 'onnxruntime')
    with pytest.raises(UsageError, match=r'needs the package onnxruntime.*pip install "cxr_fastai\[onnx\]"'):
        Predictor.load('pretrained')


def test_probabilities_do_not_depend_on_the_device_auto(boxed, monkeypatch):
    monkeypatch.setattr(Bundle, '_computes_on_gpu', lambda *_: True)
    squares = Bundle.open(boxed).selftest.images
    p, _ = Bundle.open(boxed).engine('auto', 'auto')(squares)
    assert np.allclose(p, Bundle.open(boxed).selftest.p, atol=1e-4)


def test_importing_the_package_does_not_read_the_model():
    code = (
        'import sys; names = [];'
        'sys.addaudithook(lambda event, args: names.append(str(args[0])) if event == "open" else None);'
        'import cxr_fastai, cxr_fastai.inference.predictor, cxr_fastai.cli;'
        'assert not [name for name in names if "cxr_fastai/pretrained" in name]'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_name_also_works_where_the_bundle_is_damaged(boxed, image, capsys):
    shutil.rmtree(boxed)
    boxed.mkdir()
    assert main(['predict', 'pretrained', str(image)]) == 2
    assert 'contains no trained model' in capsys.readouterr().err
    assert os.listdir(boxed) == []
