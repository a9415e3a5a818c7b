"""Labels that out-of-fold predictions contradict are ranked first, and duplicates with other labels are found."""

import shutil

import numpy as np
import pandas as pd
import pytest
from label_review import plant
from runfiles import COPY

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.series import Series
from cxr_fastai.data.items import read_items
from cxr_fastai.evaluation import label_review
from cxr_fastai.evaluation.cross_validation import evaluate_folds, read_out_of_fold
from cxr_fastai.evaluation.label_review import (
    CONTRADICTS,
    DUPLICATE,
    REVIEW_COLUMNS,
    WEAK,
    LabelReview,
    calibrate_folds,
    default_top,
    find_conflicts,
    list_conflicts,
    rank_labels,
    review_labels,
)
from cxr_fastai.training.series import train_seeds


@pytest.fixture(scope='module')
def review(folds_with_a_copy, tmp_path_factory) -> LabelReview:
    """The review of a copy of these folds, which are evaluated by it."""
    folder = tmp_path_factory.mktemp('review') / 'folds'
    shutil.copytree(folds_with_a_copy.path, folder)
    return review_labels(folder, top=7)


def scores(
    n: int = 2000,
    share: float = 0.02,
    scales: tuple[float, ...] = (1, 1, 1),
    shifts: tuple[float, ...] = (0, 0, 0),
) -> tuple[pd.DataFrame, set[str]]:
    """Simulated out-of-fold predictions with an AUC of 0.98, and the paths of which the label is flipped.

    The logits of the network of each fold are multiplied by its scale, and its shift is added.
    """
    rng = np.random.default_rng(0)
    positive = rng.random(n) < 0.7
    fold = rng.integers(len(scales), size=n)
    logit = np.where(positive, 3, -3) + 2 * rng.normal(size=n)
    p = 1 / (1 + np.exp(-logit * np.array(scales)[fold] - np.array(shifts)[fold]))
    flipped = rng.permutation(n) < share * n
    table = pd.DataFrame(
        {
            'path': [f'{i:04d}.png' for i in range(n)],
            'label': np.where(positive ^ flipped, 'PNEUMONIA', 'NORMAL'),
            'patient': [f'p{i}' for i in range(n)],
            'p_pneumonia': p,
            'fold': [f'fold-{i}' for i in fold],
        }
    )
    return table, set(table.path[flipped])


@pytest.mark.parametrize('scales', [(1, 1, 1), (0.5, 1, 2)])
def test_flipped_labels_are_among_the_first_images(scales):
    predictions, flipped = scores(scales=scales)
    first = rank_labels(predictions).head(80)
    assert len(flipped) == 40 and len(flipped & set(first.path)) >= 0.8 * 40


def test_the_ranking_has_every_image_once_with_the_probability_of_its_label_and_a_reason():
    predictions, _ = scores(100)
    ranked = rank_labels(predictions)
    assert ranked.columns.to_list() == REVIEW_COLUMNS and ranked['rank'].to_list() == list(range(1, 101))
    assert set(ranked.path) == set(predictions.path) and ranked.p_label.is_monotonic_increasing
    for (_, label), rows in ranked.groupby(['fold', 'label']):
        ordered = rows.p_pneumonia if label == 'PNEUMONIA' else -rows.p_pneumonia
        assert ordered.is_monotonic_increasing
    assert ((ranked.p_label < 0.5) == (ranked.reason == CONTRADICTS)).all() and set(ranked.reason) == {
        CONTRADICTS,
        WEAK,
    }


def test_the_scores_of_all_folds_are_brought_to_one_scale():
    plain, flipped = scores(scales=(1, 1, 1))
    scaled, _ = scores(scales=(0.5, 1, 2), shifts=(2, 0, -2))
    assert np.allclose(calibrate_folds(plain), calibrate_folds(scaled), atol=0.05)
    raw = np.where(scaled.label == 'PNEUMONIA', scaled.p_pneumonia, 1 - scaled.p_pneumonia)
    first_by_raw = set(scaled.path[np.argsort(raw)[:80]])
    assert len(flipped & set(rank_labels(scaled).path[:80])) > len(flipped & first_by_raw)


@pytest.mark.parametrize('label', ['NORMAL', 'PNEUMONIA'])
def test_separated_and_single_classes_have_finite_scores(label):
    predictions, _ = scores(20, share=0)
    separated = predictions.assign(p_pneumonia=np.where(predictions.label == label, 0.9, 0.1))
    for table in (separated, predictions.assign(label=label), predictions.head(1)):
        assert rank_labels(table).p_label.between(0, 1, inclusive='neither').all()


def test_the_default_number_of_images_is_a_share_with_limits():
    assert [default_top(n) for n in (5, 300, 5232, 10**6)] == [5, 20, 210, 250]


def test_duplicates_conflict_only_with_other_labels():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 32, 32), dtype=np.uint8)
    items = pd.DataFrame({'path': list('abcde'), 'label': ['NORMAL', 'PNEUMONIA', 'NORMAL', 'NORMAL', 'NORMAL']})
    conflicts = find_conflicts(items, np.stack([first, first, first, second, second]))
    assert sorted(pair[:2] for pair in conflicts) == [('a', 'b'), ('b', 'c')]


def test_each_conflicting_image_is_listed_once_next_to_its_duplicate():
    predictions, _ = scores(10)
    ranked = rank_labels(predictions)
    low, high, other = ranked.path[0], ranked.path[9], ranked.path[5]
    listed = list_conflicts(ranked, [(high, low, 0.996), (other, low, 0.999)])
    assert listed.path.to_list() == [low, other, high]
    assert listed.duplicate_of.to_list() == [other, low, low] and set(listed.reason) == {DUPLICATE}
    assert list_conflicts(ranked, []).empty


def test_without_conflicts_only_contradictions_are_listed(review, monkeypatch):
    monkeypatch.setattr(label_review, 'find_conflicts', lambda *_: [])
    table = review_labels(review.series, top=4).table
    assert len(table) == 4 and DUPLICATE not in set(table.reason)


def test_the_review_lists_the_copy_first_and_then_the_most_contradicted_labels(review, images_with_a_copy):
    table = review.table
    paths = read_items(images_with_a_copy).path
    original = sorted(paths[paths.str.startswith('train/NORMAL')])[0]
    assert set(table.path[:2]) == {COPY, original} and list(table.reason[:2]) == [DUPLICATE, DUPLICATE]
    assert set(table.duplicate_of[:2]) == {COPY, original}
    assert len(table) == 9 and table.path.is_unique and table['rank'].to_list() == list(range(1, 10))
    others = table[2:]
    rest = rank_labels(review.predictions)
    rest = rest[~rest.path.isin(table.path[:2])]
    assert others.path.to_list() == rest.path.head(7).to_list() and (others.duplicate_of == '').all()


def test_each_image_is_scored_by_the_fold_that_did_not_train_on_its_patient(review):
    for name, rows in review.table.groupby('fold'):
        items = read_run_items(review.series, name)
        trained_on = items[items.split == 'train']
        assert not set(rows.patient) & set(trained_on.patient) and not set(rows.path) & set(trained_on.path)


def read_run_items(series: Series, name: str) -> pd.DataFrame:
    return {run.path.name: run for run in series.open_runs()}[name].items


def test_folds_are_evaluated_only_if_they_have_not_been(folds_with_a_copy, tmp_path):
    folder = tmp_path / 'folds'
    shutil.copytree(folds_with_a_copy.path, folder)
    series = Series.open(folder)
    evaluate_folds(series, rule='fixed:0.3')
    before = (folder / 'out_of_fold.csv').read_bytes()
    predictions = read_out_of_fold(series)
    assert (folder / 'out_of_fold.csv').read_bytes() == before and set(predictions.fold) == {'fold-0', 'fold-1'}
    weights = [folder / fold / 'model.safetensors' for fold in ('fold-0', 'fold-1')]
    shutil.copy(*weights)
    read_out_of_fold(series)
    assert (folder / 'out_of_fold.csv').read_bytes() != before


def test_only_folds_can_be_reviewed(folds_with_a_copy, images_with_a_copy, tmp_path):
    for folder in (folds_with_a_copy.path / 'fold-0', tmp_path):
        with pytest.raises(UsageError, match='not the folder of `train --folds`'):
            review_labels(folder)
    seeds = train_seeds(folds_with_a_copy.recipe, images_with_a_copy, tmp_path / 'seeds', 2)
    with pytest.raises(UsageError, match='there are no folds'):
        review_labels(seeds)
    with pytest.raises(UsageError, match='not the folder of `train --folds`'):
        review_labels(seeds.path)
    with pytest.raises(UsageError, match='--top 0'):
        review_labels(folds_with_a_copy, top=0)


def test_planted_labels_keep_their_patients(images):
    items = read_items(images)
    planted = plant(items, 0.1, seed=0)
    assert planted.planted.sum() == round(0.1 * len(items)) and planted.patient.equals(items.patient)
    assert (planted.label != items.label).equals(planted.planted)
    assert planted.equals(plant(items, 0.1, seed=0)) and not planted.equals(plant(items, 0.1, seed=1))
