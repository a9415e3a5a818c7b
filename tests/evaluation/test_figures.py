"""An evaluation writes figures and small images, and selects the images that a report shows."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_fastai.core.run import Run
from cxr_fastai.evaluation import figures
from cxr_fastai.evaluation.evaluation import Evaluation
from cxr_fastai.evaluation.figures import (
    PICTURE_SIZE,
    cam_picture,
    evaluate_and_draw,
    image_picture,
    save_picture,
    shown_images,
    typical_correct,
    worst_errors,
)


@pytest.fixture
def predictions() -> pd.DataFrame:
    table = pd.DataFrame(
        {
            'path': list('abcdefgh'),
            'label': ['NORMAL'] * 4 + ['PNEUMONIA'] * 4,
            'p_pneumonia': [0.1, 0.2, 0.4, 0.9, 0.95, 0.6, 0.7, 0.3],
        }
    )
    table['prediction'] = np.where(table.p_pneumonia >= 0.5, 'PNEUMONIA', 'NORMAL')
    p_of_label = table.p_pneumonia.where(table.label == 'PNEUMONIA', 1 - table.p_pneumonia)
    return table.assign(loss=-np.log(p_of_label))


def test_the_worst_errors_have_the_greatest_loss(predictions):
    assert worst_errors(predictions).path.to_list() == ['d', 'h']
    assert worst_errors(predictions, 1).path.to_list() == ['d']


def test_typical_correct_predictions_have_a_loss_close_to_the_median_of_their_class(predictions):
    assert typical_correct(predictions, 2).path.to_list() == ['b', 'g']


def test_a_report_shows_errors_before_correct_predictions(predictions):
    shown = shown_images(predictions)
    assert shown.path.to_list()[:2] == ['d', 'h'] and (shown.prediction == shown.label).to_list()[2:] == [True] * 6


def test_a_picture_is_small_and_its_name_reveals_nothing(tmp_path):
    run = Run(tmp_path)
    picture = image_picture(run, 'test/NORMAL/Meier_Anna.jpeg')
    assert 'Meier' not in str(picture) and picture != image_picture(run, 'test/NORMAL/other.jpeg')
    assert picture.parent == run / 'figures/images'
    cam = cam_picture(run, 'test/NORMAL/Meier_Anna.jpeg', 'a' * 64)
    assert cam.parent == run / 'figures/cams' and cam != cam_picture(run, 'test/NORMAL/Meier_Anna.jpeg', 'b' * 64)
    save_picture(np.zeros((400, 800), np.uint8), picture)
    with Image.open(picture) as image:
        assert image.size == (PICTURE_SIZE, PICTURE_SIZE // 2)


def test_an_evaluation_draws_its_split_and_other_splits_with_changed_metrics(evaluated, images, tmp_path, monkeypatch):
    run = Run(tmp_path / 'run')
    shutil.copytree(evaluated.path, run.path)
    drawn = []

    def record_split(run: Run, split: str) -> list[str]:
        drawn.append(split)
        return [f'figures/roc_{split}.png']

    monkeypatch.setattr(figures, 'save_figures', record_split)  # drawing takes long
    metrics, names = evaluate_and_draw(run, Evaluation(images))
    assert drawn == ['test'] and names == ['figures/roc_test.png'] and metrics == run.metrics['test']
    evaluate_and_draw(run, Evaluation(images, rule='fixed:0.2'))
    assert drawn == ['test', 'valid', 'test']
    for path in shown_images(run.predicted('test')).path:
        assert image_picture(run, path).is_file()
