"""Robustness is measured on the same corrupted images for every model, and next to clean images."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation import figures, robustness
from cxr_fastai.evaluation.plots import plot_robustness
from cxr_fastai.evaluation.robustness import (
    ROBUSTNESS_COLUMNS,
    evaluate_robustness,
    measure_robustness,
    read_robustness,
    read_squares,
    summarise,
)
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.images.anatomy import ANATOMY, LUNGS
from cxr_fastai.images.corruptions import CORRUPTIONS, STRENGTHS, sharpness
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig

SUMMARY = ('clean', 'corrupted', 'shortcut', 'loss', 'lungs_hidden', 'thorax_hidden', 'lungs_only', 'exchanged')


@dataclass
class FakePredictor:
    """Scores every image by a function, and keeps the images that it was given."""

    config: ModelConfig
    score: Callable[[np.ndarray], float]
    tta: bool = False
    images: list[np.ndarray] = field(default_factory=list)

    def scores(self, images: np.ndarray) -> np.ndarray:
        self.images.append(images)
        return np.array([self.score(image) for image in images])


def model(score, size: int = 224) -> FakePredictor:
    return FakePredictor(ModelConfig('baseline', size, 0.5), score)


def constant(image: np.ndarray) -> float:
    return 0.7


def mean(image: np.ndarray) -> float:
    return float(image.mean() / 255)


def blurriness(image: np.ndarray) -> float:
    return 1 / (1 + sharpness(image)[0])


@pytest.fixture
def few(run) -> tuple:
    return find_split(run, None, 'valid', limit=3)


def test_the_table_has_a_row_for_clean_images_each_corruption_and_strength_and_the_shortcut(few):
    root, items = few
    table = measure_robustness(model(mean), items.assign(patient=items.path), root)
    assert list(table) == ROBUSTNESS_COLUMNS and set(table.n) == {6}
    corruptions = [(kind, s) for kind in CORRUPTIONS for s in STRENGTHS]
    expected = [('clean', 0), *corruptions, ('shortcut', 0), *((name, 0) for name in ANATOMY)]
    assert list(zip(table.corruption, table.strength, strict=True)) == expected
    assert ((table.auc_low <= table.auc) & (table.auc <= table.auc_high)).all()


def test_a_constant_score_has_an_auc_of_one_half_on_all_images(few):
    root, items = few
    table = measure_robustness(model(constant), items, root)
    assert set(table.auc) == {0.5} and set(table.sensitivity) == {1} and set(table.specificity) == {0}
    assert summarise(table) == dict.fromkeys(SUMMARY, 0.5) | {'loss': 0}


def test_each_image_is_read_once(few, monkeypatch):
    root, items = few
    reads = Counter()

    def count_and_open(path, preprocessing):
        reads.update([path])
        return open_image(path, preprocessing)

    monkeypatch.setattr(robustness, 'open_image', count_and_open)
    measure_robustness(model(constant), items, root)
    assert reads == Counter(root / path for path in items.path)


def test_models_of_different_input_sizes_get_the_same_corrupted_images(few):
    root, items = few
    large, small = model(constant), model(constant, 64)
    for predictor in (large, small):
        measure_robustness(predictor, items, root, batch_size=5)
    fit = Preprocessing(64).fit
    expected = np.stack([fit(image) for image in np.concatenate(large.images)])
    assert np.array_equal(np.concatenate(small.images), expected)
    assert max(len(batch) for batch in small.images) == 5


def test_the_numbers_of_threads_and_the_batch_size_do_not_change_the_result(few):
    root, items = few
    sequential = measure_robustness(model(mean), items, root, batch_size=1, workers=1)
    parallel = measure_robustness(model(mean), items, root, batch_size=64, workers=3)
    pd.testing.assert_frame_equal(sequential, parallel)


def test_many_images_are_stored_in_a_temporary_file(few, monkeypatch):
    root, items = few
    squares, sides = read_squares(items, root, Preprocessing(64))
    monkeypatch.setattr(robustness, 'MAX_IN_MEMORY', 0)
    stored_squares, stored_sides = read_squares(items, root, Preprocessing(64))
    assert isinstance(stored_squares, np.memmap) and not isinstance(squares, np.memmap)
    assert np.array_equal(squares, stored_squares) and np.array_equal(sides, stored_sides)


def test_a_model_that_scores_sharpness_fails_on_equally_sharp_images(images, tmp_path):
    rows = []
    for i, path in enumerate(
        sorted((images / 'train').rglob('*.jpeg'))
    ):  # every other image is blurred and labelled PNEUMONIA
        name = f'{i}.png'
        Image.open(path).filter(ImageFilter.GaussianBlur(i % 2 * (1 + i % 3))).save(tmp_path / name)
        rows.append((name, ('NORMAL', 'PNEUMONIA')[i % 2]))
    summary = summarise(measure_robustness(model(blurriness), pd.DataFrame(rows, columns=['path', 'label']), tmp_path))
    assert summary['clean'] > 0.95 and abs(summary['shortcut'] - 0.5) < 0.2
    assert summary['loss'] == pytest.approx(summary['clean'] - summary['shortcut'])


def test_the_auc_of_one_class_is_missing(few):
    root, items = few
    table = measure_robustness(model(mean), items[items.label == 'NORMAL'], root)
    assert table.auc.isna().all() and table.sensitivity.isna().all() and table.specificity.notna().all()


def test_kinds_of_corruption_have_equal_weight_in_the_mean():
    rows = [('clean', 0, 0.9), ('a', 1, 0.8), ('a', 2, 0.6), ('b', 1, 0.5), ('shortcut', 0, 0.6)]
    summary = summarise(pd.DataFrame(rows, columns=['corruption', 'strength', 'auc']))
    assert summary == pytest.approx({'clean': 0.9, 'corrupted': 0.6, 'shortcut': 0.6, 'loss': 0.3})


def centre_of(image: np.ndarray) -> float:
    return float(image[LUNGS.mask(len(image))].mean() / 255)


def edge_of(image: np.ndarray) -> float:
    return float(image[~LUNGS.mask(len(image))].mean() / 255)


@pytest.mark.parametrize(('score', 'lungs'), [(centre_of, True), (edge_of, False)])
def test_a_model_is_measured_by_where_it_looks(score, lungs, tmp_path):
    rows = []
    for i in range(12):  # the label is in the lungs and around them
        square = np.full((64, 64), 60 + 10 * i, np.uint8)
        square[::2] += 40  # a constant image would be refused
        Image.fromarray(square).save(tmp_path / f'{i}.png')
        rows.append((f'{i}.png', ('NORMAL', 'PNEUMONIA')[i // 6]))
    table = measure_robustness(model(score), pd.DataFrame(rows, columns=['path', 'label']), tmp_path)
    auc = dict(zip(table.corruption, table.auc, strict=True))
    assert auc['clean'] == 1 and auc['surroundings exchanged'] == (1 if lungs else 0)
    assert auc['lungs hidden, black'] == (0.5 if lungs else 1) and auc['lungs only, black'] == (1 if lungs else 0.5)
    summary = summarise(table)
    assert summary['exchanged'] == auc['surroundings exchanged'] and summary['lungs_hidden'] == 1  # by the mean level
    assert summarise(table[table.corruption != 'surroundings exchanged']).keys() == {*SUMMARY[:4]}


@pytest.fixture
def copy(run, tmp_path) -> Run:
    shutil.copytree(run.path, tmp_path / 'run')
    return Run(tmp_path / 'run')


def test_the_command_prints_the_table_and_writes_a_csv_file_and_a_figure(copy, capsys, monkeypatch):
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])  # other figures take long and are tested elsewhere
    assert main(['evaluate', str(copy.path), '--split', 'valid', '--robustness', '--limit', '3']) == 0
    output = capsys.readouterr().out
    assert all(
        word in output
        for word in (*CORRUPTIONS, 'shortcut', 'mean over the corruptions', 'lungs hidden', 'surroundings exchanged')
    )
    assert 'robustness.csv, figures/robustness_valid.png' in output
    assert (copy / 'figures/robustness_valid.png').stat().st_size > 10_000
    assert set(copy.robustness.split) == {'valid'} and len(copy.robustness) == 2 + 5 * len(CORRUPTIONS) + len(ANATOMY)


def test_the_robustness_on_other_splits_is_kept(copy, monkeypatch):
    monkeypatch.setattr(robustness, 'save_robustness_figure', lambda *_: None)  # takes long
    for split in ('test', 'valid', 'test'):
        evaluate_robustness(copy, None, split, limit=1)
    assert copy.robustness.split.value_counts().to_dict() == {'test': 52, 'valid': 52}


def test_a_table_of_another_threshold_or_other_views_is_named_as_stale(copy, capsys, monkeypatch):
    monkeypatch.setattr(robustness, 'save_robustness_figure', lambda *_: None)  # takes long
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])
    monkeypatch.setattr(robustness, 'STRENGTHS', (1,))
    evaluate = ['evaluate', str(copy.path), '--split', 'valid']
    assert main([*evaluate, '--robustness', '--json']) == 0
    output = capsys.readouterr()
    (rows,) = (run['robustness'] for run in json.loads(output.out)['runs'])
    assert {(row['threshold'], row['tta']) for row in rows} == {(copy.decision['threshold'], False)}
    assert 'robustness' not in output.err and read_robustness(copy, 'valid') is not None
    for options, problem in {
        ('--tta',): 'were measured without test-time views, and the run was evaluated with them since',
        ('--no-tta', '--threshold', 'fixed:0.9'): r'were measured at the threshold \S+, and that of the run is 0.9 now',
    }.items():
        assert main([*evaluate, *options, '--json']) == 0
        output = capsys.readouterr()
        assert re.search(rf'{problem}, so they are not used. Run `cxr-fastai .* --split valid --robust', output.err)
        with pytest.warns(CXRWarning, match=problem):
            assert read_robustness(copy, 'valid') is None
    assert main([*evaluate, '--robustness']) == 0
    assert 'not used' not in capsys.readouterr().err and set(read_robustness(copy, 'valid').threshold) == {0.9}
    assert main([*evaluate, '--tta', '--robustness', '--json']) == 0
    assert {row['tta'] for row in json.loads(capsys.readouterr().out)['runs'][0]['robustness']} == {True}


def test_a_table_of_an_older_version_is_named_and_replaced(copy, monkeypatch):
    monkeypatch.setattr(robustness, 'save_robustness_figure', lambda *_: None)
    monkeypatch.setattr(robustness, 'STRENGTHS', (1,))
    evaluate_robustness(copy, None, 'test', limit=1)
    copy.robustness.drop(columns=['threshold', 'tta']).to_csv(copy / 'robustness.csv', index=False)
    with pytest.warns(CXRWarning, match='the rows of test were measured by an older version, so they are not used'):
        assert read_robustness(copy, 'test') is None
    with pytest.warns(CXRWarning, match='robustness.csv: an older version wrote the rows of test, .* are removed'):
        evaluate_robustness(copy, None, 'valid', limit=1)
    assert set(copy.robustness.split) == {'valid'}


def test_the_figure_shows_every_kind_of_corruption_and_the_auc_of_clean_images(few):
    root, items = few
    table = measure_robustness(model(mean), items, root)
    panels = plot_robustness(table, 'a run').axes
    assert [panel.get_title().split(',')[0] for panel in panels] == list(CORRUPTIONS)
    shown = panels[0].lines[-1].get_ydata()
    assert shown.tolist() == table[table.corruption == 'crop and scale'].auc.tolist()
    assert panels[0].lines[0].get_ydata()[0] == table.auc[0]


def test_a_larger_network_input_enlarges_the_squares(few):
    root, items = few
    large = replace(model(constant).config, size=256)
    predictor = FakePredictor(large, constant)
    measure_robustness(predictor, items.head(2), root)
    assert {batch.shape[1:] for batch in predictor.images} == {(256, 256)}
