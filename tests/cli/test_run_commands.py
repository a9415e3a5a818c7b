"""The commands that read a run or a model: `evaluate` and `predict`."""

import json
import re
import shutil

import pandas as pd
import pytest
from imagefiles import DEEP, dicom, encoded

from cxr_fastai.cli import main
from cxr_fastai.evaluation import figures


@pytest.mark.parametrize(
    ('name', 'pattern'), [('recipe.json', 'recipe.json: .*damaged'), ('items.csv', 'is missing: `cxr-fastai train`')]
)
def test_a_damaged_run_is_one_error_line(fails, run, images, tmp_path, name, pattern):
    copy = tmp_path / 'run'
    shutil.copytree(run.path, copy)
    if name.endswith('json'):
        (copy / name).write_text('{')
    else:
        (copy / name).unlink()
    fails(['evaluate', copy, '--data', images], 2, pattern)


def test_evaluate_prints_the_targets_and_draws_figures(capsys, run, images, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(run.path, copy)
    assert main(['evaluate', str(copy), '--data', str(images), '--split', 'test']) == 0
    printed = capsys.readouterr().out
    assert 'sensitivity' in printed and re.search('met|missed', printed)
    figures = {path.name for path in (copy / 'figures').iterdir()}
    curves = ('calibration', 'confusion', 'net_benefit', 'precision_recall', 'risk_coverage', 'roc', 'scores')
    assert figures == {'images', 'history.png', 'train_batch.png', *(f'{name}_test.png' for name in curves)}


def test_evaluate_uses_the_given_rule_and_prevalence(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])  # the figures take long and are tested above
    copy = tmp_path / 'run'
    shutil.copytree(run.path, copy)
    options = ['--threshold', 'cost:3/1', '--prevalence', '5%', '--prevalence', '0.1']
    assert main(['evaluate', str(copy), '--data', str(images), *options]) == 0
    metrics = json.loads((copy / 'metrics.json').read_text())['test']
    assert metrics['threshold_rule'] == 'cost:3/1'
    assert [row['prevalence'] for row in metrics['prevalences']] == [0.05, 0.1]


@pytest.mark.parametrize('share', ['5', '0', '100%', 'nan', 'abc', '-1%'])
def test_a_prevalence_is_a_share_or_a_percentage(fails, run, share):
    fails(['evaluate', run.path, '--prevalence', share], 2, f'--prevalence {share}: .*Write it as 5% or as 0.05')


def test_evaluate_needs_a_run_folder(fails, tmp_path):
    fails(['evaluate', tmp_path], 2, 'is not a run folder')


@pytest.mark.parametrize('model', ['run', 'pkl'])
def test_predict_writes_a_row_for_each_image_and_fails_only_for_the_bad_one(capsys, run, images, tmp_path, model):
    bad = tmp_path / 'bad.jpeg'
    bad.write_bytes(b'')
    table = tmp_path / 'p.csv'
    source = run.path if model == 'run' else run / 'learner.pkl'
    assert main(['predict', str(source), str(images / 'test'), str(bad), '--out', str(table)]) == 3
    rows = pd.read_csv(table)
    assert rows.status.to_list() == ['ok'] * 12 + ['error']
    assert rows.code[12] == 'E_EMPTY'
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith('error: ')] == [f'error: {bad}: E_EMPTY: the file is empty']
    assert len([line for line in errors if 'no input gate' in line]) == 1


def test_predict_notes_the_window_of_deep_images_and_rejects_other_pictures(run, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    files = {'a.png': encoded(DEEP), 'b.dcm': dicom(), 'c.dcm': dicom(Modality='CT'), 'd.tif': b'II*\0'}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert main(['predict', str(run.path), str(folder), '--out', str(tmp_path / 'p.csv')]) == 3
    rows = pd.read_csv(tmp_path / 'p.csv')
    assert rows.status.to_list() == ['ok', 'ok', 'rejected', 'error']
    assert rows.code.fillna('').to_list() == ['', '', 'E_DICOM_MODALITY', 'E_TRUNCATED']
    assert rows.message[:2].str.contains('window 1014 to 3985').all()
    assert rows.message.str.len().max() <= 200


def test_predict_overwrites_nothing(fails, run, images, tmp_path):
    table = tmp_path / 'p.csv'
    table.write_text('precious')
    fails(['predict', run.path, images, '--out', table], 2, 'exists already and was not changed')
    assert table.read_text() == 'precious'


def test_predict_without_a_model_says_what_a_model_is(fails, images, tmp_path):
    fails(['predict', tmp_path / 'nothing', images], 2, 'Name a run folder')


def test_maps_of_an_earlier_prediction_are_not_predicted(run, images, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    image = next((images / 'test/NORMAL').iterdir())
    (folder / image.name).write_bytes(image.read_bytes())
    assert main(['predict', str(run.path), str(folder), '--out', str(folder / 'p.csv'), '--explain']) == 0
    assert main(['explain', str(run.path), str(folder / image.name), '--out', str(folder / 'explained')]) == 0
    capsys.readouterr()
    assert main(['predict', str(run.path), str(folder)]) == 0
    shown = capsys.readouterr()
    assert '1 image,' in shown.out
    assert '2 maps or figures of cxr_fastai' in shown.err


def test_evaluate_says_what_was_left_out(run, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / 'images')
    (tmp_path / 'images/test/notes.txt').write_text('x')
    (tmp_path / 'images/test/NORMAL/x.webp').write_bytes(b'RIFF\x10\0\0\0WEBP')
    copy = shutil.copytree(run.path, tmp_path / 'run')
    assert main(['evaluate', str(copy), '--data', str(tmp_path / 'images'), '--limit', '3']) == 0
    out = capsys.readouterr().out
    assert 'files left out: ' in out and '1 in the format WebP' in out and '1 not an image' in out
    assert main(['data', 'prepare', str(tmp_path / 'images'), '--size', '48']) == 0
    assert '1 in the format WebP' in capsys.readouterr().out
