"""One pass a split, the threshold from validation images alone, and nothing lost or mixed up on the way."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from cxr_fastai.core.errors import CXRWarning, ImageError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import COLUMNS, evaluate, find_split, judge
from cxr_fastai.evaluation.metrics import measure
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor


@pytest.fixture
def copy(run, tmp_path) -> Run:
    shutil.copytree(run.path, tmp_path / 'run')
    return Run(tmp_path / 'run')


def test_evaluating_writes_the_contracts_files(copy, images):
    measured = evaluate(copy, images, 'test')
    predictions = pd.read_csv(copy / 'predictions.csv')
    assert list(predictions) == COLUMNS and predictions.split.value_counts().to_dict() == {'test': 12, 'valid': 12}
    assert json.loads((copy / 'metrics.json').read_text())['test'] == measured and measured['n'] == 12
    right = predictions.p_pneumonia.where(predictions.label == 'PNEUMONIA', 1 - predictions.p_pneumonia)
    assert np.allclose(predictions.loss, -np.log(right), atol=1e-5)
    again = copy.predictions.query('split == "test"').assign(kind=lambda table: table.path.map(kind))
    decided = Decision(**copy.decision)
    assert measured == measure(again, decided.threshold, 'sensitivity:0.95', decided.temperature, by=['kind']) | {
        'model': decided.model,
        'images': measured['images'],
    }


def kind(path: str) -> str:
    return next((kind for kind in ('bacteria', 'virus') if kind in path), 'normal')


def test_the_threshold_comes_from_valid_and_permuted_test_labels_change_nothing(copy, images, tmp_path):
    evaluate(copy, images, 'test')
    first = copy.decision
    shutil.copytree(images, tmp_path / 'turned')
    shutil.move(tmp_path / 'turned/test/NORMAL', tmp_path / 'turned/test/X')
    shutil.move(tmp_path / 'turned/test/PNEUMONIA', tmp_path / 'turned/test/NORMAL')
    shutil.move(tmp_path / 'turned/test/X', tmp_path / 'turned/test/PNEUMONIA')
    turned = evaluate(copy, tmp_path / 'turned', 'test')
    assert copy.decision == first and turned['threshold'] == first['threshold']


def test_every_call_in_the_table_is_that_of_the_threshold(copy, images):
    for rule in ('fixed:0.3', 'youden', 'sensitivity:0.9'):
        measured = evaluate(copy, images, 'test', rule=rule)
        table = copy.predictions
        assert set(judge(table, measured['threshold']).prediction == table.prediction) == {True}
        assert measured['threshold_rule'] == rule == copy.metrics['valid']['threshold_rule']
        assert copy.metrics['valid']['threshold'] == measured['threshold'] == copy.decision['threshold']


def test_a_rule_is_remembered(copy, images):
    evaluate(copy, images, 'test', rule='fixed:0.25')
    assert evaluate(copy, images, 'test')['threshold'] == 0.25


def test_predict_decides_as_evaluate_did(copy, images):
    measured = evaluate(copy, images, 'test', rule='fixed:0.45')
    table = copy.predictions.query('split == "test"')
    rows = list(Predictor.load(copy.path).predict([images / path for path in table.path]))
    assert [row['prediction'] for row in rows] == table.prediction.to_list()
    assert {row['threshold'] for row in rows} == {measured['threshold']}


def test_calibrated_predictions_decide_alike_and_order_alike(copy, images):
    evaluate(copy, images, 'test')
    paths = [images / path for path in copy.predictions.path]
    raw, calibrated = (pd.DataFrame(Predictor.load(copy.path, warm).predict(paths)) for warm in (False, True))
    t = copy.decision['temperature']
    assert t != 1 and (raw.prediction == calibrated.prediction).all()
    assert np.allclose(
        np.log(calibrated.p_pneumonia / (1 - calibrated.p_pneumonia)) * t,
        np.log(raw.p_pneumonia / (1 - raw.p_pneumonia)),
    )
    with pytest.raises(UsageError, match='--calibrated needs the temperature'):
        Predictor.load(copy / 'learner.pkl', calibrated=True)


def test_a_decision_for_another_network_is_not_used(copy, images):
    evaluate(copy, images, 'test', rule='fixed:0.45')
    file = copy / 'model.safetensors'
    save_file(load_file(file), file, {'another': 'network'})
    with pytest.warns(CXRWarning, match='chosen for another network'):
        assert Predictor.load(copy.path).threshold == 0.5
    evaluate(copy, images, 'valid')
    assert set(copy.metrics) == {'valid'} and copy.metrics['valid']['threshold_rule'] == 'sensitivity:0.95'


def test_validation_images_that_were_predicted_need_not_be_there_again(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    there = evaluate(copy, images, 'valid')
    hide(copy, tmp_path)
    assert evaluate(copy, tmp_path / 'elsewhere', 'test')['threshold'] == there['threshold']


def hide(run: Run, folder) -> None:
    """Make `run` forget where its images are."""
    run.log_event('resume', data=str(folder / 'nowhere'))


def test_without_validation_images_no_threshold_is_chosen_on_others(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    hide(copy, tmp_path)
    with pytest.warns(CXRWarning, match='at hand, so no threshold was chosen'):
        assert evaluate(copy, tmp_path / 'elsewhere', 'test')['threshold_rule'] == 'fixed:0.5'
    with pytest.raises(UsageError, match='youden: it is chosen on all validation images'):
        evaluate(copy, tmp_path / 'elsewhere', 'test', rule='youden')
    assert evaluate(copy, tmp_path / 'elsewhere', 'test', rule='fixed:0.4')['threshold'] == 0.4
    assert not copy.decision


def test_a_trial_on_some_images_chooses_no_threshold(copy, images):
    evaluate(copy, images, 'test', limit=2)
    whole = copy.decision
    assert whole['valid']['n'] == 12 == copy.metrics['valid']['n'] and copy.metrics['test']['n'] == 4
    evaluate(copy, images, 'valid', limit=2)
    assert copy.decision == whole and copy.metrics['valid']['n'] == 4
    evaluate(copy, images, 'test')
    assert copy.decision == whole and copy.metrics['valid']['n'] == 12  # predicted again, whole


def test_images_of_another_folder_are_not_taken_for_known(copy, images, tmp_path):
    first = evaluate(copy, images, 'test')
    shutil.copytree(images, tmp_path / 'turned')
    for image in (tmp_path / 'turned/test').rglob('*.jpeg'):
        ImageOps.mirror(Image.open(image)).save(image)
    turned = evaluate(copy, tmp_path / 'turned', 'test', again=False)
    assert turned['auc'] != first['auc'] or turned['brier'] != first['brier']
    assert evaluate(copy, images, 'test', again=False)['brier'] == first['brier']


def test_another_threshold_judges_every_split_anew(copy, images, capsys):
    evaluate(copy, images, 'valid', prevalences=[0.4])
    evaluate(copy, images, 'test', rule='fixed:0.2')
    valid = copy.metrics['valid']
    assert (valid['threshold'], valid['prevalences'][0]['prevalence']) == (0.2, 0.4)
    assert {group['column'] for group in valid['subgroups']} == {'kind'}


def test_groups_that_cannot_be_told_again_are_missed_aloud(copy, images, tmp_path):
    paths = sorted(str(path) for path in (images / 'test').rglob('*.jpeg'))
    pd.DataFrame({'path': paths, 'split': 'test', 'sex': 'f'}).assign(
        label=lambda table: table.path.str.extract('(NORMAL|PNEUMONIA)')[0]
    ).to_csv(tmp_path / 'f.csv', index=False)
    evaluate(copy, tmp_path / 'f.csv', 'test', by=['sex'])
    with pytest.warns(CXRWarning, match='split test is judged by another threshold now, without its groups by sex'):
        evaluate(copy, images, 'valid', rule='fixed:0.2')


def test_groups_of_any_column_of_a_csv(copy, images, tmp_path):
    items = pd.DataFrame({'path': sorted(str(path) for path in (images / 'test').rglob('*.jpeg'))})
    items = items.assign(label=items.path.str.extract('(NORMAL|PNEUMONIA)')[0], split='test', sex=['f', 'm'] * 6)
    items.to_csv(tmp_path / 'images.csv', index=False)
    measured = evaluate(copy, tmp_path / 'images.csv', 'test', by=['kind', 'Sex'])
    assert [group['column'] for group in measured['subgroups']] == ['kind', 'sex']
    assert measured['subgroups'][1] == {'column': 'sex', 'group': None, 'suppressed': 2}  # six images each
    with pytest.raises(UsageError, match='no column age. Choose one of path, label, split, patient, kind'):
        evaluate(copy, images, 'test', by=['age'])


def test_a_second_split_joins_the_first_and_a_second_time_replaces_it(copy):
    for split in ('test', 'valid', 'test'):
        evaluate(copy, None, split)
    assert set(copy.metrics) == {'test', 'valid'}
    assert copy.predictions.split.value_counts().to_dict() == {'test': 12, 'valid': 12}


def test_the_validation_figures_are_those_of_the_best_epoch(copy):
    measured, best = evaluate(copy, None, 'valid'), copy.last_event('end')['best']
    assert measured['auc']['value'] == pytest.approx(best['roc_auc'], abs=1e-9)
    assert copy.predictions.loss.mean() == pytest.approx(best['valid_loss'], rel=1e-4)


def test_a_folder_with_only_test_images_is_enough(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    assert evaluate(copy, tmp_path / 'elsewhere', 'test')['n'] == 12


def test_without_data_the_images_are_those_it_was_trained_on(run, images, monkeypatch):
    monkeypatch.setenv('CXR_DATA', '/nowhere')
    root, items = find_split(run, None, 'valid')
    assert root == images and items.path.to_list() == run.items[run.items.split == 'valid'].path.to_list()


def test_valid_means_the_split_of_the_training_also_when_its_folder_is_named(copy, images):
    moved = copy.items.assign(split=lambda t: t.split.where(t.split == 'test', 'train'))
    moved.loc[moved.index[:5], 'split'] = 'valid'
    moved.to_csv(copy / 'items.csv', index=False)
    assert find_split(copy, images, 'valid')[1].path.to_list() == moved.path[:5].to_list()


def test_valid_in_a_copy_of_the_folder_is_still_the_split_of_the_training(copy, images, tmp_path):
    shutil.copytree(images, tmp_path / 'moved')
    trained = copy.items.assign(split=lambda t: t.split.replace({'train': 'valid', 'valid': 'train'}))
    trained.to_csv(copy / 'items.csv', index=False)
    root, items = find_split(copy, tmp_path / 'moved', 'valid')
    assert root == tmp_path / 'moved' and set(items.path) == set(trained[trained.split == 'valid'].path)
    next((tmp_path / 'moved/train').rglob('*.jpeg')).unlink()
    with pytest.raises(UsageError, match='are among those of the run, but not all'):
        find_split(copy, tmp_path / 'moved', 'valid')


def test_a_patient_called_by_a_number_keeps_its_zeros(copy):
    copy.items.assign(patient='007').to_csv(copy / 'items.csv', index=False)
    assert set(copy.items.patient) == {'007'}


def test_an_empty_split_says_what_there_is(copy, images, tmp_path):
    shutil.copytree(images / 'train', tmp_path / 'elsewhere/train')
    with pytest.raises(UsageError, match='the split test has no images; found train 36, valid 0, test 0'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')


def test_an_unreadable_image_is_named_and_nothing_is_written(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    next((tmp_path / 'elsewhere').rglob('IM*.jpeg')).write_bytes(b'broken')
    with pytest.raises(ImageError, match=r'IM-\d+-\d+.jpeg: E_FORMAT.*Remove or mend it'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')
    assert not any((copy / name).exists() for name in ('metrics.json', 'predictions.csv', 'decision.json'))
