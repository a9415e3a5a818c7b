"""Intervals of images that are grouped by patient, also where patients are few.

Images of a patient resemble each other, so variances are estimated from the sums of each patient. Such an estimate is
itself uncertain where patients are few, which quantiles of Student's t account for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import t

from cxr_fastai.evaluation.intervals import (
    Z95,
    Estimate,
    auc_interval,
    delong_variance,
    difference_interval,
    logit_interval,
    make_estimate,
    newcombe_interval,
    placements,
)

MIN_PATIENTS = 2
"""Patients (of each class, for an AUC) below which there is no interval: nothing shows how patients vary."""
MANY_PATIENTS = 50
"""Patients of each class from which the AUC of grouped images has a symmetric interval on the logit scale."""


class Spread(NamedTuple):
    """The variance of an estimate, and the degrees of freedom with which it is known."""

    variance: float
    df: float

    def quantile(self) -> float:
        """Return the 97.5th percentile of Student's t distribution."""
        return float(t.ppf(0.975, self.df))


def mean_spread(values: np.ndarray, patients: np.ndarray) -> Spread | None:
    """Return the spread of the mean of the images' `values` (n,), images of the same of `patients` (n,) depending.

    It is the variance of a ratio, the sum of the values over the number of images, by linearisation with the factor
    k/(k - 1) for k patients (Korn and Graubard 1999). None for fewer than `MIN_PATIENTS` patients.
    """
    return _sum_spread(values - values.mean(), patients, len(values))


def _sum_spread(residuals: np.ndarray, patients: np.ndarray, size: int) -> Spread | None:
    """Return the spread of the sum of `residuals` (n,), divided by `size`.

    A sum of squares with the variance v has 2 (sum)²/v degrees of freedom (Satterthwaite 1946), at most k - 1 for k
    patients. Here v is the sum of the fourth powers, so they are few where a few patients make up most of the sum.
    """
    _, patient_of_image = np.unique(patients, return_inverse=True)
    sums = np.bincount(patient_of_image, residuals)
    k = len(sums)
    if k < MIN_PATIENTS:
        return None
    squares = float((sums**2).sum())
    fourth_powers = float((sums**4).sum())
    df = min(k - 1, 2 * squares**2 / fourth_powers) if fourth_powers > 0 else k - 1
    return Spread(k / (k - 1) * squares / size**2, df)


def effective_size(correct: np.ndarray, patients: np.ndarray) -> float | None:
    """Return the number of independent images that determine the proportion of `correct` images (n,) as well.

    It is the size with the design effect and the degrees of freedom of Korn and Graubard (1998), at most the number of
    images. Where all images or none are correct, it is the number of patients. None if images are grouped and belong to
    fewer than `MIN_PATIENTS` patients.
    """
    n = len(correct)
    n_patients = len(np.unique(patients))
    if n_patients == n:
        return n
    spread = mean_spread(correct.astype(float), patients)
    if spread is None:
        return None
    proportion = correct.mean()
    if proportion in (0, 1):
        return n_patients
    if spread.variance == 0:
        return n
    adjustment = (Z95 / spread.quantile()) ** 2
    return float(min(n, proportion * (1 - proportion) / spread.variance * adjustment))


def clustered_auc(targs: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> Estimate:
    """Area under the ROC curve of `scores` (n,) for the boolean `targs` (n,), images being grouped by `patients` (n,).

    The variance is that of DeLong for clusters (Obuchowski 1997). From `MANY_PATIENTS` patients of each class the
    interval is symmetric on the logit scale, with a quantile of t. With fewer it is method 5 of Newcombe (2006) for the
    effective numbers of images, and for the numbers of patients where the variance is 0. It is never narrower than that
    of independent images. No interval for fewer than `MIN_PATIENTS` patients of a class.
    """
    independent = auc_interval(targs, scores)
    auc = independent['value']
    if auc is None:
        return independent
    above, below = placements(targs, scores)
    spread = _auc_spread(above, below, targs, patients)
    if spread is None:
        return make_estimate(auc)
    n_patients = [len(np.unique(patients[in_class])) for in_class in (targs, ~targs)]
    if spread.variance == 0 or auc in (0, 1):
        interval = newcombe_interval(auc, *n_patients)
    elif min(n_patients) >= MANY_PATIENTS:
        interval = logit_interval(auc, float(np.sqrt(spread.variance)), spread.df)
    else:
        share = min(1, delong_variance(above, below) / spread.variance) * (Z95 / spread.quantile()) ** 2
        interval = newcombe_interval(auc, max(1, share * len(above)), max(1, share * len(below)))
    return _wider(interval, independent)


def _wider(first: Estimate, second: Estimate) -> Estimate:
    """Return the interval that contains both intervals of the same value."""
    lows = [estimate['low'] for estimate in (first, second) if estimate['low'] is not None]
    highs = [estimate['high'] for estimate in (first, second) if estimate['high'] is not None]
    return make_estimate(first['value'], min(lows), max(highs))


def compare_clustered_auc(targs: np.ndarray, first: np.ndarray, second: np.ndarray, patients: np.ndarray) -> Estimate:
    """AUC of the scores `first` minus AUC of the scores `second` on the same images, all (n,), grouped by `patients`.

    Adds `p`, the two-sided p-value. The variance is that of DeLong's paired test for clusters (Obuchowski 1997), at
    least that for independent images, with the quantiles of t. Undefined for fewer than `MIN_PATIENTS` patients of a
    class.
    """
    if targs.all() or not targs.any():
        return make_estimate(None) | {'p': None}
    first_above, first_below = placements(targs, first)
    second_above, second_below = placements(targs, second)
    above = first_above - second_above
    below = first_below - second_below
    spread = _auc_spread(above, below, targs, patients)
    if spread is None:
        return make_estimate(None) | {'p': None}
    variance = max(spread.variance, delong_variance(above, below))
    return difference_interval(float(above.mean()), float(np.sqrt(variance)), spread.df)


def _auc_spread(above: np.ndarray, below: np.ndarray, targs: np.ndarray, patients: np.ndarray) -> Spread | None:
    """Return the spread of the mean of placement values, or of their differences: of positives, and of negatives.

    A patient with images of both classes adds a covariance. None for fewer than `MIN_PATIENTS` patients of a class.
    """
    mean = above.mean()
    positives = _sum_spread(above - mean, patients[targs], len(above))
    negatives = _sum_spread(below - mean, patients[~targs], len(below))
    if positives is None or negatives is None:
        return None
    names, patient_of_image = np.unique(patients, return_inverse=True)
    k = len(names)
    sums_above = np.bincount(patient_of_image[targs], above - mean, k)
    sums_below = np.bincount(patient_of_image[~targs], below - mean, k)
    covariance = k / (k - 1) * (sums_above * sums_below).sum() / (len(above) * len(below))
    independent = positives.variance + negatives.variance
    if independent == 0:
        return Spread(0.0, min(positives.df, negatives.df))
    df = independent**2 / (positives.variance**2 / positives.df + negatives.variance**2 / negatives.df)
    return Spread(max(0.0, float(independent + 2 * covariance)), df)
