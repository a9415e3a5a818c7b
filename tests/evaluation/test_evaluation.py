"""A run is evaluated on a split: predictions, threshold from the validation images, and metrics."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from cxr_fastai.core.errors import CXRError, CXRWarning, ImageError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import apply_threshold, evaluate
from cxr_fastai.evaluation.metrics import measure
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.evaluation.split_predictions import PREDICTION_COLUMNS
from cxr_fastai.inference.config import logits
from cxr_fastai.inference.decision import Decision
from cxr_fastai.inference.predictor import Predictor


@pytest.fixture
def copy(run, tmp_path) -> Run:
    shutil.copytree(run.path, tmp_path / 'run')
    return Run(tmp_path / 'run')


def test_evaluate_writes_predictions_metrics_and_decision(copy, images):
    metrics = evaluate(copy, images, 'test')
    predictions = pd.read_csv(copy / 'predictions.csv')
    assert list(predictions) == PREDICTION_COLUMNS
    assert predictions.split.value_counts().to_dict() == {'test': 12, 'valid': 12}
    assert json.loads((copy / 'metrics.json').read_text())['test'] == metrics and metrics['n'] == 12
    p_of_label = predictions.p_pneumonia.where(predictions.label == 'PNEUMONIA', 1 - predictions.p_pneumonia)
    assert np.allclose(predictions.loss, -np.log(p_of_label), atol=1e-5)
    test = copy.predicted('test')
    test['kind'] = test.path.str.extract('(bacteria|virus)', expand=False).fillna('normal')
    decision = Decision(**copy.decision)
    expected = measure(test, decision.threshold, 'sensitivity:0.95', decision.temperature, by=['kind'])
    stamps = ('images', 'tta', 'hashes')
    assert metrics == expected | {'model': decision.model} | {name: metrics[name] for name in stamps}


def test_the_labels_of_the_test_images_do_not_change_the_threshold(copy, images, tmp_path):
    evaluate(copy, images, 'test')
    first = copy.decision
    shutil.copytree(images, tmp_path / 'swapped')
    shutil.move(tmp_path / 'swapped/test/NORMAL', tmp_path / 'swapped/test/X')
    shutil.move(tmp_path / 'swapped/test/PNEUMONIA', tmp_path / 'swapped/test/NORMAL')
    shutil.move(tmp_path / 'swapped/test/X', tmp_path / 'swapped/test/PNEUMONIA')
    swapped = evaluate(copy, tmp_path / 'swapped', 'test')
    assert copy.decision == first and swapped['threshold'] == first['threshold']


def test_stored_predictions_follow_the_threshold(copy, images):
    for rule in ('fixed:0.3', 'youden', 'sensitivity:0.9'):
        metrics = evaluate(copy, images, 'test', rule=rule)
        predictions = copy.predictions
        assert (apply_threshold(predictions, metrics['threshold']).prediction == predictions.prediction).all()
        assert metrics['threshold_rule'] == rule == copy.metrics['valid']['threshold_rule']
        assert copy.metrics['valid']['threshold'] == metrics['threshold'] == copy.decision['threshold']


def test_the_rule_of_the_last_evaluation_is_the_default(copy, images):
    evaluate(copy, images, 'test', rule='fixed:0.25')
    assert evaluate(copy, images, 'test')['threshold'] == 0.25


def test_predict_uses_the_threshold_of_evaluate(copy, images):
    metrics = evaluate(copy, images, 'test', rule='fixed:0.45')
    predictions = copy.predicted('test')
    rows = list(Predictor.load(copy.path).predict([images / path for path in predictions.path]))
    assert [row['prediction'] for row in rows] == predictions.prediction.to_list()
    assert {row['threshold'] for row in rows} == {metrics['threshold']}


def test_calibrated_probabilities_keep_the_class_and_the_order(copy, images, tmp_path):
    evaluate(copy, images, 'test')
    paths = [images / path for path in copy.predictions.path]
    raw = pd.DataFrame(Predictor.load(copy.path).predict(paths))
    calibrated = pd.DataFrame(Predictor.load(copy.path, calibrated=True).predict(paths))
    temperature = copy.decision['temperature']
    assert temperature != 1 and (raw.prediction == calibrated.prediction).all()
    scaled = logits(calibrated.p_pneumonia.to_numpy(float)) * temperature
    assert np.allclose(scaled, logits(raw.p_pneumonia.to_numpy(float)))
    shutil.copy(copy / 'learner.pkl', tmp_path / 'lone.pkl')
    with pytest.raises(UsageError, match='--calibrated needs a temperature'):
        Predictor.load(tmp_path / 'lone.pkl', calibrated=True)


def test_a_threshold_for_another_network_is_not_used(copy, images):
    evaluate(copy, images, 'test', rule='fixed:0.45')
    file = copy / 'model.safetensors'
    save_file(load_file(file), file, {'another': 'network'})
    with pytest.warns(CXRWarning, match='made for another network'):
        assert Predictor.load(copy.path).threshold == 0.5
    evaluate(copy, images, 'valid')
    assert set(copy.metrics) == {'valid'} and copy.metrics['valid']['threshold_rule'] == 'sensitivity:0.95'


def test_validation_images_that_were_predicted_may_be_missing_later(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    valid = evaluate(copy, images, 'valid')
    hide_images(copy, tmp_path)
    assert evaluate(copy, tmp_path / 'elsewhere', 'test')['threshold'] == valid['threshold']


def hide_images(run: Run, folder: Path) -> None:
    """Record a folder of images that does not exist in the journal of `run`."""
    run.log_event('resume', data=str(folder / 'nowhere'))


def test_without_all_validation_images_no_threshold_is_chosen(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    hide_images(copy, tmp_path)
    with pytest.warns(CXRWarning, match='no threshold was chosen, because not all validation images'):
        assert evaluate(copy, tmp_path / 'elsewhere', 'test')['threshold_rule'] == 'fixed:0.5'
    with pytest.raises(UsageError, match='youden: this rule requires all validation images'):
        evaluate(copy, tmp_path / 'elsewhere', 'test', rule='youden')
    with pytest.warns(CXRWarning, match='no threshold was chosen'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')
    assert copy.decision['is_default'] and Predictor.load(copy.path).threshold == 0.5
    assert evaluate(copy, images, 'test')['threshold_rule'] == 'sensitivity:0.95'


def test_a_fixed_threshold_without_validation_images_is_the_decision_of_the_run(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    hide_images(copy, tmp_path)
    assert evaluate(copy, tmp_path / 'elsewhere', 'test', rule='fixed:0.4')['threshold'] == 0.4
    assert Predictor.load(copy.path).threshold == copy.decision['threshold'] == 0.4
    assert evaluate(copy, images, 'test')['threshold_rule'] == 'fixed:0.4'


def test_a_limit_does_not_change_the_threshold(copy, images):
    evaluate(copy, images, 'test', limit=2)
    decision = copy.decision
    assert decision['valid']['n'] == 12 == copy.metrics['valid']['n'] and copy.metrics['test']['n'] == 4
    evaluate(copy, images, 'valid', limit=2)
    assert copy.decision == decision and copy.metrics['valid']['n'] == 4
    evaluate(copy, images, 'test')
    assert copy.decision == decision and copy.metrics['valid']['n'] == 12  # all validation images were predicted again


def test_changed_image_files_are_predicted_again(copy, images, tmp_path):
    first = evaluate(copy, images, 'test')
    shutil.copytree(images, tmp_path / 'mirrored')
    for image in (tmp_path / 'mirrored/test').rglob('*.jpeg'):
        ImageOps.mirror(Image.open(image)).save(image)
    mirrored = evaluate(copy, tmp_path / 'mirrored', 'test', again=False)
    assert mirrored['auc'] != first['auc'] or mirrored['brier'] != first['brier']
    assert evaluate(copy, images, 'test', again=False)['brier'] == first['brier']


def test_a_new_threshold_updates_the_metrics_of_other_splits(copy, images, capsys):
    evaluate(copy, images, 'valid', prevalences=[0.4])
    evaluate(copy, images, 'test', rule='fixed:0.2')
    valid = copy.metrics['valid']
    assert (valid['threshold'], valid['prevalences'][0]['prevalence']) == (0.2, 0.4)
    assert {group['column'] for group in valid['subgroups']} == {'kind'}


def write_test_csv(images: Path, csv: Path, sex: str | list[str]) -> Path:
    """List the test images in a CSV file with a column `sex`."""
    items = pd.DataFrame({'path': sorted(str(path) for path in (images / 'test').rglob('*.jpeg'))})
    items['label'] = items.path.str.extract('(NORMAL|PNEUMONIA)', expand=False)
    items['split'] = 'test'
    items['sex'] = sex
    items.to_csv(csv, index=False)
    return csv


def test_subgroups_that_are_lost_by_a_new_threshold_cause_a_warning(copy, images, tmp_path):
    evaluate(copy, write_test_csv(images, tmp_path / 'f.csv', 'f'), 'test', by=['sex'])
    with pytest.warns(
        CXRWarning, match='split test were computed again with another threshold, without the subgroups by sex'
    ):
        evaluate(copy, images, 'valid', rule='fixed:0.2')


def test_groups_and_prevalences_stay_in_force_until_others_are_chosen(copy, images, tmp_path):
    csv = write_test_csv(images, tmp_path / 'images.csv', ['f', 'm'] * 6)
    chosen = evaluate(copy, csv, by=['kind', 'sex'], prevalences=[0.4])
    again = evaluate(copy, csv)
    assert again['subgroups'] == chosen['subgroups'] and again['prevalences'] == chosen['prevalences']
    assert {group['column'] for group in evaluate(copy, images, 'valid')['subgroups']} == {'kind'}
    other = evaluate(copy, csv, by=['kind'], prevalences=[0.1])
    assert {group['column'] for group in other['subgroups']} == {'kind'}
    assert [row['prevalence'] for row in evaluate(copy, csv)['prevalences']] == [0.1]


def test_a_group_that_the_images_do_not_have_any_more_is_warned_of(copy, images, tmp_path):
    csv = write_test_csv(images, tmp_path / 'images.csv', ['f', 'm'] * 6)
    evaluate(copy, csv, by=['kind', 'sex'])
    with pytest.warns(CXRWarning, match='no column sex any more, by which the last evaluation of this split'):
        subgroups = evaluate(copy, images)['subgroups']
    assert {group['column'] for group in subgroups} == {'kind'}
    with pytest.raises(CXRError, match='no such folder'):
        evaluate(copy, tmp_path / 'missing')


def test_any_column_of_a_csv_file_defines_subgroups(copy, images, tmp_path):
    csv = write_test_csv(images, tmp_path / 'images.csv', ['f', 'm'] * 6)
    subgroups = evaluate(copy, csv, 'test', by=['kind', 'Sex'])['subgroups']
    assert [group['column'] for group in subgroups] == ['kind', 'sex']
    assert subgroups[1] == {'column': 'sex', 'group': None, 'suppressed': 2}  # six images each
    with pytest.raises(UsageError, match='no column age. Choose one of path, label, split, patient, kind'):
        evaluate(copy, images, 'test', by=['age'])


def test_a_second_split_is_added_and_a_repeated_split_is_replaced(copy):
    for split in ('test', 'valid', 'test'):
        evaluate(copy, None, split)
    assert set(copy.metrics) == {'test', 'valid'}
    assert copy.predictions.split.value_counts().to_dict() == {'test': 12, 'valid': 12}


def test_the_validation_metrics_are_those_of_the_best_epoch(copy):
    metrics = evaluate(copy, None, 'valid')
    best = copy.last_event('end')['best']
    assert metrics['auc']['value'] == pytest.approx(best['roc_auc'], abs=1e-9)
    assert copy.predictions.loss.mean() == pytest.approx(best['valid_loss'], rel=1e-4)


def test_a_folder_with_only_test_images_can_be_evaluated(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    assert evaluate(copy, tmp_path / 'elsewhere', 'test')['n'] == 12


def test_without_data_the_images_are_those_of_the_training(run, images, monkeypatch):
    monkeypatch.setenv('CXR_DATA', '/nowhere')
    root, items = find_split(run, None, 'valid')
    assert root == images and items.path.to_list() == run.items[run.items.split == 'valid'].path.to_list()


def test_valid_means_the_split_of_the_training_where_its_folder_is_named(copy, images):
    items = copy.items
    items['split'] = items.split.where(items.split == 'test', 'train')
    items.loc[items.index[:5], 'split'] = 'valid'
    items.to_csv(copy / 'items.csv', index=False)
    _, valid = find_split(copy, images, 'valid')
    assert valid.path.to_list() == items.path[:5].to_list()


def test_valid_means_the_split_of_the_training_in_a_copy_of_the_folder(copy, images, tmp_path):
    shutil.copytree(images, tmp_path / 'moved')
    items = copy.items
    items['split'] = items.split.replace({'train': 'valid', 'valid': 'train'})
    items.to_csv(copy / 'items.csv', index=False)
    root, valid = find_split(copy, tmp_path / 'moved', 'valid')
    assert root == tmp_path / 'moved' and set(valid.path) == set(items[items.split == 'valid'].path)
    next((tmp_path / 'moved/train').rglob('*.jpeg')).unlink()
    with pytest.raises(UsageError, match='images of its valid split, but other images of the run are missing'):
        find_split(copy, tmp_path / 'moved', 'valid')


def test_leading_zeros_of_a_patient_number_are_kept(copy):
    copy.items.assign(patient='007').to_csv(copy / 'items.csv', index=False)
    assert set(copy.items.patient) == {'007'}


def test_the_error_for_an_empty_split_counts_the_images_of_every_split(copy, images, tmp_path):
    shutil.copytree(images / 'train', tmp_path / 'elsewhere/train')
    with pytest.raises(UsageError, match=r'the split test has no images \(found train 36, valid 0, test 0\)'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')


def test_an_unreadable_image_is_named_and_no_file_is_written(copy, images, tmp_path):
    shutil.copytree(images / 'test', tmp_path / 'elsewhere/test')
    next((tmp_path / 'elsewhere').rglob('IM*.jpeg')).write_bytes(b'broken')
    with pytest.raises(ImageError, match=r'IM-\d+-\d+.jpeg: E_FORMAT.*Remove or fix it'):
        evaluate(copy, tmp_path / 'elsewhere', 'test')
    assert not any((copy / name).exists() for name in ('metrics.json', 'predictions.csv', 'decision.json'))
