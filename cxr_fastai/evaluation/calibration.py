"""Calibration of predicted probabilities: how it is measured, and temperature scaling."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit, xlog1py, xlogy
from scipy.stats import t

from cxr_fastai.core.progress import are, counted
from cxr_fastai.evaluation.clusters import MIN_PATIENTS, effective_size, mean_spread
from cxr_fastai.evaluation.intervals import Estimate, make_estimate, wilson_interval
from cxr_fastai.inference.config import EDGE, logits

ECE_BINS = 15
NULL_DRAWS = 2000
DRAWS_PER_BLOCK = 100
"""Number of null draws held in memory at once."""
TEMPERATURE_RANGE = (0.05, 20.0)
MIN_LOGIT_RANGE = 0.01
"""Range of the logits below which they determine no slope."""
MAX_SLOPE = 1 / TEMPERATURE_RANGE[0]
"""Largest slope, and largest distance from it to the limits of its interval, of probabilities that determine it."""
MAX_INTERCEPT = 10.0
"""Distance beyond the largest logit within which intercepts are searched for."""


def fit_temperature(targs: np.ndarray, p: np.ndarray) -> float:
    """Find the temperature that minimises the log loss of `p` (n,) on the boolean targets `targs` (n,).

    Temperature scaling (Guo et al. 2017) divides the logits by it. Returns 1, which changes nothing, where the loss has
    no minimum: images of a single class, or complete separation of the classes.
    """
    if targs.all() or not targs.any() or p[targs].min() > p[~targs].max():
        return 1.0
    z = logits(p)
    signed_logits = np.where(targs, -z, z)

    def mean_log_loss(log_temperature: float) -> float:
        return float(np.mean(np.logaddexp(0, signed_logits / np.exp(log_temperature))))

    minimum = minimize_scalar(mean_log_loss, bounds=np.log(TEMPERATURE_RANGE), method='bounded')
    return float(np.exp(minimum.x))


def explain_temperature(temperature: float | None) -> list[str]:
    """Return a sentence about a `temperature` that was not fitted, or is at a limit of its range; else none."""
    if temperature is None:
        return ['No temperature was fitted, because the validation images were not found. Nothing is calibrated.']
    low, high = TEMPERATURE_RANGE
    if 1.01 * low < temperature < high / 1.01:
        return []
    return [
        f'The temperature {temperature:.3g} is at the limit of its range, because the validation images are too few or '
        'too well separated to determine it. Calibrated probabilities are not reliable.'
    ]


def measure_calibration(targs: np.ndarray, p: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """Measure the calibration of probabilities `p` (n,) for the boolean targets `targs` (n,).

    Args:
        patients: patient of each image, (n,); standard errors are grouped by it.

    Returns:
        `brier` and `log_loss` (nats), `ece` with its value expected by chance, the results of `recalibrate`, and
        `notes` about them.
    """
    recalibration = recalibrate(targs, p, patients)
    return {
        'brier': _mean_with_interval((p - targs) ** 2, patients),
        'log_loss': _mean_with_interval(log_losses(targs, p), patients),
        'ece': {'value': calibration_error(targs, p), **chance_error(p)},
        **recalibration,
        'notes': explain_recalibration(targs, p, recalibration['slope']),
    }


def _mean_with_interval(values: np.ndarray, patients: np.ndarray) -> Estimate:
    """Return the mean of `values` (n,) >= 0; its interval is symmetric on the log scale, grouped by patient."""
    mean = float(values.mean())
    spread = mean_spread(values, patients)
    if spread is None or mean == 0:
        return make_estimate(mean)
    factor = np.exp(spread.quantile() * np.sqrt(spread.variance) / mean)
    return make_estimate(mean, mean / factor, mean * factor)


def log_losses(targs: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Cross-entropy (n,) of each image in nats."""
    clipped = np.clip(p, EDGE, 1 - EDGE)
    losses: np.ndarray = -(xlogy(targs, clipped) + xlog1py(~targs, -clipped))
    return losses


def calibration_error(targs: np.ndarray, p: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error over `bins` bins of equal width (Naeini et al. 2015).

    It is the mean distance between the share of positives and the mean probability, weighted by the images of a bin.
    """
    sums = np.bincount(_equal_width_bins(p, bins), targs - p, bins)
    return float(np.abs(sums).sum() / len(p))


def chance_error(p: np.ndarray, bins: int = ECE_BINS, draws: int = NULL_DRAWS, seed: int = 0) -> dict[str, float]:
    """Simulate the expected calibration error of a perfectly calibrated model with the probabilities `p` (n,).

    It is above 0, because the share of positives in a bin varies by chance. Returns its mean (`chance`) and its 95th
    percentile (`chance_high`) over `draws` simulated sets of targets.
    """
    rng = np.random.default_rng(seed)
    membership = (_equal_width_bins(p, bins)[:, None] == np.arange(bins)).astype(np.float64)  # (n, bins)
    blocks = []
    for _ in range(draws // DRAWS_PER_BLOCK):
        simulated_targs = rng.random((DRAWS_PER_BLOCK, len(p))) < p
        blocks.append(np.abs((simulated_targs - p) @ membership).sum(axis=1))
    errors = np.concatenate(blocks) / len(p)
    return {'chance': float(errors.mean()), 'chance_high': float(np.percentile(errors, 95))}


def _equal_width_bins(p: np.ndarray, bins: int) -> np.ndarray:
    """Index (n,) of the bin of each probability."""
    return np.minimum((p * bins).astype(int), bins - 1)


def recalibrate(targs: np.ndarray, p: np.ndarray, patients: np.ndarray) -> dict[str, Estimate]:
    """Calibration slope and intercept by logistic regression of the targets on the logits of `p` (Cox 1958).

    `slope` is 1 for calibrated probabilities and below 1 for probabilities that are too extreme. `intercept` is that of
    a regression with a slope of 1 (calibration in the large): 0 for calibrated probabilities and above 0 for
    probabilities that are too low. Standard errors are grouped by patient. Both are undefined for images of a single
    class, the slope also where the images do not determine it: for complete separation, for nearly equal probabilities,
    and if it or its interval is beyond `MAX_SLOPE`. `explain_recalibration` says so.
    """
    if targs.all() or not targs.any():
        return {'slope': make_estimate(None), 'intercept': make_estimate(None)}
    z = logits(p)
    has_slope = np.ptp(z) >= MIN_LOGIT_RANGE and not _is_separated(targs, z)
    slope = _fit_slope(targs, z, patients) if has_slope else make_estimate(None)
    return {'slope': slope, 'intercept': _fit_intercept(targs, z, patients)}


def _is_separated(targs: np.ndarray, z: np.ndarray) -> bool:
    """Return whether a limit separates the logits of the two classes; then the likelihood has no maximum."""
    positive, negative = z[targs], z[~targs]
    return bool(positive.min() >= negative.max() or positive.max() <= negative.min())


def _fit_slope(targs: np.ndarray, z: np.ndarray, patients: np.ndarray) -> Estimate:
    """Fit a logistic regression on the logits `z` (n,) and a constant; return the coefficient of `z`.

    It is undefined if it is beyond `MAX_SLOPE`, or if half the width of its interval is.
    """
    import statsmodels.api as sm

    _, groups = np.unique(patients, return_inverse=True)
    n_patients = groups.max() + 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            model = sm.GLM(targs.astype(float), np.column_stack([z, np.ones(len(z))]), sm.families.Binomial())
            fit = model.fit(cov_type='cluster', cov_kwds={'groups': groups})
        except Exception:  # statsmodels reports a fit that did not converge by warnings and errors of many types
            return make_estimate(None)
    slope, error = fit.params[0], fit.bse[0]
    if not abs(slope) <= MAX_SLOPE:  # or NaN
        return make_estimate(None)
    if n_patients < MIN_PATIENTS or not np.isfinite(error):
        return make_estimate(slope)
    half_width = t.ppf(0.975, n_patients - 1) * error
    if half_width > MAX_SLOPE:
        return make_estimate(None)
    return make_estimate(slope, slope - half_width, slope + half_width)


def _fit_intercept(targs: np.ndarray, z: np.ndarray, patients: np.ndarray) -> Estimate:
    """Find the constant that, added to the logits `z` (n,), predicts as many positives as there are.

    It exists for both classes, however extreme the logits. The limits are the constants at which the number of
    positives differs from the predicted one by its standard error times the quantile of t (a score interval).
    """
    largest = float(np.abs(z).max()) + MAX_INTERCEPT

    def excess(constant: float) -> float:
        return float((targs - expit(z + constant)).sum())

    def score(constant: float, sign: int) -> float:
        residuals = targs - expit(z + constant)
        spread = mean_spread(residuals, patients)
        error = spread.quantile() * np.sqrt(spread.variance) * len(z) if spread else np.inf
        return float(residuals.sum() - sign * error)

    value = brentq(excess, -largest, largest)
    if score(-largest, 1) <= 0 or score(largest, -1) >= 0:  # too few patients: every constant is possible
        return make_estimate(value)
    return make_estimate(value, brentq(score, -largest, value, args=(1,)), brentq(score, value, largest, args=(-1,)))


def explain_recalibration(targs: np.ndarray, p: np.ndarray, slope: Estimate) -> list[str]:
    """Return sentences about why `slope` and the intercept of `recalibrate` are undefined or depend on a limit."""
    if targs.all() or not targs.any():
        return ['Slope and intercept are undefined for images of a single class.']
    notes = []
    if slope['value'] is None:
        notes.append(f'The slope is undefined, because {_explain_no_slope(targs, logits(p))}.')
    n_limited = int(((p <= EDGE) | (p >= 1 - EDGE)).sum())
    if n_limited:
        notes.append(
            f'{counted(n_limited, "probability")} {are(n_limited)} 0 or 1 to the last digit. Logits are limited to '
            f'±{-np.log(EDGE):.1f}, on which slope and intercept depend.'
        )
    return notes


def _explain_no_slope(targs: np.ndarray, z: np.ndarray) -> str:
    if np.ptp(z) < MIN_LOGIT_RANGE:
        return 'all probabilities are nearly equal'
    if _is_separated(targs, z):
        return 'the probabilities separate the classes completely'
    return (
        f'these images do not determine it (it, or half its interval, is beyond {MAX_SLOPE:g}): the probabilities '
        'hardly vary, or separate the classes almost completely'
    )


def reliability(
    targs: np.ndarray, p: np.ndarray, patients: np.ndarray, bins: int = 10, min_distance: float = 0
) -> pd.DataFrame:
    """Group the images into up to `bins` bins of equal size by probability, for a reliability diagram.

    Adjacent bins are merged until their mean probabilities differ by at least `min_distance`, so that a diagram does
    not draw several bins in one place.

    Returns:
        One row per bin: `n` images, mean probability `p`, and `share` of pneumonia with Wilson's interval `low` to
        `high` for the effective size by `patients` (n,), NaN if there is none. Images with equal probabilities stay in
        one bin.
    """
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)))
    last_bin = max(len(edges) - 2, 0)
    bin_of_image = np.clip(np.searchsorted(edges, p, side='right') - 1, 0, last_bin)
    bin_of_image = _merge_bins(p, bin_of_image, min_distance)
    rows = []
    for index in np.unique(bin_of_image):
        inside = bin_of_image == index
        total = int(inside.sum())
        size = effective_size(targs[inside], patients[inside])
        share = wilson_interval(int(targs[inside].sum()), total, size)
        limits = (np.nan, np.nan) if size is None else (share['low'], share['high'])
        rows.append((total, p[inside].mean(), share['value'], *limits))
    return pd.DataFrame(rows, columns=['n', 'p', 'share', 'low', 'high'])


def _merge_bins(p: np.ndarray, bin_of_image: np.ndarray, min_distance: float) -> np.ndarray:
    """Merge the two closest adjacent bins until all mean probabilities differ by at least `min_distance`."""
    merged = bin_of_image.copy()
    while True:
        indices = np.unique(merged)
        means = [p[merged == index].mean() for index in indices]
        distances = np.diff(means)
        if not len(distances) or distances.min() >= min_distance:
            return merged
        closest = distances.argmin()
        merged[merged == indices[closest + 1]] = indices[closest]
