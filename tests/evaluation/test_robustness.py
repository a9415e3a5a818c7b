"""Every model meets the same harmed images, and what it does on them is told beside what it does on clean ones."""

import shutil
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation import robustness
from cxr_fastai.evaluation.evaluation import find_split
from cxr_fastai.evaluation.robustness import COLUMNS, evaluate_robustness, measure_robustness
from cxr_fastai.images.corruptions import CORRUPTIONS, STRENGTHS, sharpness, summarise
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.evaluation.plots import plot_robustness


@dataclass
class Model:
    """Stands for a `Predictor`: gives every image the score `of` it, and keeps the images."""

    config: ModelConfig
    of: object
    images: list = field(default_factory=list)

    def scores(self, images: np.ndarray) -> np.ndarray:
        self.images.append(images)
        return np.array([self.of(image) for image in images])


def model(of, size: int = 224) -> Model:
    return Model(ModelConfig('baseline', size, 0.5), of)


def constant(image: np.ndarray) -> float:
    return 0.7


def mean(image: np.ndarray) -> float:
    return float(image.mean() / 255)


def dullness(image: np.ndarray) -> float:
    return 1 / (1 + sharpness(image)[0])


@pytest.fixture
def few(run) -> tuple:
    return find_split(run, None, 'valid', limit=3)


def test_a_row_for_each_corruption_and_strength_and_for_clean_and_shortcut(few):
    root, items = few
    table = measure_robustness(model(mean), items, root)
    assert list(table) == COLUMNS and set(table.n) == {6}
    wanted = [('clean', 0), *((kind, s) for kind in CORRUPTIONS for s in STRENGTHS), ('shortcut', 0)]
    assert list(zip(table.corruption, table.strength, strict=True)) == wanted
    assert ((table.auc_low <= table.auc) & (table.auc <= table.auc_high)).all()


def test_a_constant_score_has_an_auc_of_a_half_everywhere(few):
    root, items = few
    table = measure_robustness(model(constant), items, root)
    assert set(table.auc) == {0.5} and set(table.sensitivity) == {1} and set(table.specificity) == {0}
    assert summarise(table) == {'clean': 0.5, 'corrupted': 0.5, 'shortcut': 0.5, 'loss': 0}


def test_images_are_read_once(few, monkeypatch):
    root, items = few
    read = Counter()
    monkeypatch.setattr(robustness, 'open_image', lambda path, wanted: read.update([path]) or open_image(path, wanted))
    measure_robustness(model(constant), items, root)
    assert read == Counter(root / path for path in items.path)


def test_models_of_different_size_meet_the_same_images(few):
    root, items = few
    large, small = model(constant), model(constant, 64)
    for each in (large, small):
        measure_robustness(each, items, root, batch_size=5)
    fit = Preprocessing(64).fit
    expected = np.stack([fit(image) for image in np.concatenate(large.images)])
    assert np.array_equal(np.concatenate(small.images), expected)
    assert max(len(batch) for batch in small.images) == 5


def test_threads_and_batches_change_nothing(few):
    root, items = few
    one, many = (measure_robustness(model(mean), items, root, batch_size=b, workers=w) for b, w in ((1, 1), (64, 3)))
    pd.testing.assert_frame_equal(one, many)


def test_many_images_are_kept_in_a_file(few, monkeypatch):
    root, items = few
    kept = robustness.read_squares(items, root, Preprocessing(64))
    monkeypatch.setattr(robustness, 'IN_MEMORY', 0)
    filed = robustness.read_squares(items, root, Preprocessing(64))
    assert isinstance(filed[0], np.memmap) and all(map(np.array_equal, kept, filed))


def test_a_model_of_sharpness_fails_where_sharpness_is_equal(images, tmp_path):
    from PIL import Image, ImageFilter

    rows = []
    for i, path in enumerate(sorted((images / 'train').rglob('*.jpeg'))):  # every other one is blurred, and called sick
        name = f'{i}.png'
        Image.open(path).filter(ImageFilter.GaussianBlur(i % 2 * (1 + i % 3))).save(tmp_path / name)
        rows.append((name, ('NORMAL', 'PNEUMONIA')[i % 2]))
    summary = summarise(measure_robustness(model(dullness), pd.DataFrame(rows, columns=['path', 'label']), tmp_path))
    assert summary['clean'] > 0.95 and abs(summary['shortcut'] - 0.5) < 0.2
    assert summary['loss'] == pytest.approx(summary['clean'] - summary['shortcut'])


def test_one_class_has_no_auc(few):
    root, items = few
    table = measure_robustness(model(mean), items[items.label == 'NORMAL'], root)
    assert table.auc.isna().all() and table.sensitivity.isna().all() and table.specificity.notna().all()


def test_kinds_weigh_equally():
    rows = [('clean', 0, 0.9), ('a', 1, 0.8), ('a', 2, 0.6), ('b', 1, 0.5), ('shortcut', 0, 0.6)]
    summary = summarise(pd.DataFrame(rows, columns=['corruption', 'strength', 'auc']))
    assert summary == pytest.approx({'clean': 0.9, 'corrupted': 0.6, 'shortcut': 0.6, 'loss': 0.3})


@pytest.fixture
def copy(run, tmp_path) -> Run:
    shutil.copytree(run.path, tmp_path / 'run')
    return Run(tmp_path / 'run')


def test_the_command_prints_the_table_and_writes_csv_and_figure(copy, capsys):
    assert main(['evaluate', str(copy.path), '--split', 'valid', '--robustness', '--limit', '3']) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in (*CORRUPTIONS, 'shortcut', 'on average over the corruptions'))
    assert 'robustness.csv, figures/robustness_valid.png' in told
    assert (copy / 'figures/robustness_valid.png').stat().st_size > 10_000
    assert set(copy.robustness.split) == {'valid'} and len(copy.robustness) == 2 + 5 * len(CORRUPTIONS)


def test_other_splits_are_kept(copy):
    for split in ('test', 'valid', 'test'):
        evaluate_robustness(copy, None, split, limit=1)
    assert copy.robustness.split.value_counts().to_dict() == {'test': 42, 'valid': 42}


def test_the_figure_shows_every_kind_beside_the_clean_level(few):
    root, items = few
    table = measure_robustness(model(mean), items, root)
    panels = plot_robustness(table, 'a run').axes
    assert [panel.get_title().split(',')[0] for panel in panels] == list(CORRUPTIONS)
    shown = panels[0].lines[-1].get_ydata()
    assert shown.tolist() == table[table.corruption == 'crop and scale'].auc.tolist()
    assert panels[0].lines[0].get_ydata()[0] == table.auc[0]


def test_a_larger_input_moves_the_working_side(few):
    root, items = few
    large = replace(model(constant).config, size=256)
    each = Model(large, constant)
    measure_robustness(each, items.head(2), root)
    assert {batch.shape[1:] for batch in each.images} == {(256, 256)}
