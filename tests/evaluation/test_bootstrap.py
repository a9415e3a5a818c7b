"""Patients are drawn whole, and every figure of a draw is what scikit-learn says of it."""

import numpy as np
import pytest
from sklearn import metrics as sk

from cxr_fastai.evaluation.intervals import (
    auc_draws,
    average_precision_draws,
    count_draws,
    deviation,
    draw_patients,
    mean_draws,
    middle,
    rate_draws,
)

RNG = np.random.default_rng(0)
PATIENTS = RNG.integers(0, 30, 80)
TARGS = PATIENTS % 3 > 0
SCORES = np.clip(RNG.normal(0.4 + 0.2 * TARGS, 0.2), 0, 1).round(1)  # with ties
WEIGHTS = draw_patients(PATIENTS, draws=40)


def test_images_of_a_patient_are_drawn_together_and_as_many_patients_as_there_are():
    for patient in set(PATIENTS):
        images = WEIGHTS[:, patient == PATIENTS].T
        assert (images == images[0]).all()
    first = [np.flatnonzero(patient == PATIENTS)[0] for patient in set(PATIENTS)]
    assert (WEIGHTS[:, first].sum(axis=1) == len(first)).all()


def test_a_seed_draws_the_same_again_and_another_otherwise():
    assert (draw_patients(PATIENTS, 40) == WEIGHTS).all() and (draw_patients(PATIENTS, 40, seed=1) != WEIGHTS).any()


def test_aucs_and_average_precisions_are_scikit_learns_of_the_weighted_images():
    auc, precision = auc_draws(WEIGHTS, TARGS, SCORES), average_precision_draws(WEIGHTS, TARGS, SCORES)
    assert auc == pytest.approx([sk.roc_auc_score(TARGS, SCORES, sample_weight=weights) for weights in WEIGHTS])
    assert precision == pytest.approx(
        [sk.average_precision_score(TARGS, SCORES, sample_weight=weights) for weights in WEIGHTS]
    )


def test_counts_and_means_are_those_of_repeated_images():
    called = SCORES >= 0.5
    cells = np.stack(count_draws(WEIGHTS, TARGS, called), axis=1)
    for weights, (tp, fp, fn, tn), mean in zip(WEIGHTS, cells, mean_draws(WEIGHTS, SCORES), strict=True):
        again = np.repeat(np.arange(80), weights.astype(int))
        found = sk.confusion_matrix(TARGS[again], called[again], labels=[False, True])
        assert found.ravel().tolist() == [tn, fp, fn, tp]
        assert mean == pytest.approx(SCORES[again].mean())


def test_rates_rise_from_nothing_to_all():
    tp, fp = rate_draws(WEIGHTS, TARGS, SCORES)
    assert (tp[:, 0] == 0).all() and (tp[:, -1] == WEIGHTS[:, TARGS].sum(axis=1)).all()
    assert (fp[:, -1] == WEIGHTS[:, ~TARGS].sum(axis=1)).all() and (np.diff(tp) >= 0).all()


def test_patients_of_one_image_vary_as_the_binomial_says():
    called = np.arange(400) < 300
    draws = mean_draws(draw_patients(np.arange(400)), called)
    assert deviation(draws) == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.08)


def test_draws_without_a_class_are_left_out():
    weights = np.array([[1.0, 1], [2, 0], [0, 2]])
    auc = auc_draws(weights, np.array([True, False]), np.array([0.9, 0.1]))
    assert auc[0] == 1 and np.isnan(auc[1:]).all() and middle(auc) == (1, 1) and deviation(auc) == 0
    assert middle(np.full(3, np.nan)) == (None, None)
