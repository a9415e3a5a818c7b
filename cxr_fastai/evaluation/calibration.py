"""Calibration of predicted probabilities: how it is measured, and temperature scaling."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import xlog1py, xlogy

from cxr_fastai.evaluation.intervals import (
    Estimate,
    make_estimate,
    mean_draws,
    percentile_interval,
    wilson_interval,
)
from cxr_fastai.inference.config import EDGE, logits

ECE_BINS = 15
NULL_DRAWS = 2000
DRAWS_PER_BLOCK = 100
"""Number of null draws held in memory at once."""
TEMPERATURE_RANGE = (0.05, 20.0)


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


def measure_calibration(targs: np.ndarray, p: np.ndarray, patients: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Measure the calibration of probabilities `p` (n,) for the boolean targets `targs` (n,).

    Args:
        patients: patient of each image, (n,); standard errors of slope and intercept are grouped by it.
        weights: bootstrap weights of `draw_patients`, (draws, n).

    Returns:
        `brier` and `log_loss` (nats) with percentile intervals, `ece` with its value expected by chance, and
        `slope` and `intercept` of the recalibration.
    """
    return {
        'brier': _mean_with_interval((p - targs) ** 2, weights),
        'log_loss': _mean_with_interval(log_losses(targs, p), weights),
        'ece': {'value': calibration_error(targs, p), **chance_error(p)},
        **recalibrate(targs, p, patients),
    }


def _mean_with_interval(values: np.ndarray, weights: np.ndarray) -> Estimate:
    low, high = percentile_interval(mean_draws(weights, values))
    return make_estimate(values.mean(), low, high)


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
    probabilities that are too low. Standard errors are grouped by patient. Undefined for images of a single class and
    for complete separation.
    """
    if targs.all() or not targs.any():
        return {'slope': make_estimate(None), 'intercept': make_estimate(None)}
    z = logits(p)
    constant = np.ones((len(p), 1))
    slope = make_estimate(None)
    if np.ptp(z) > 1e-9:  # equal logits determine no slope
        slope = _first_coefficient(targs, np.column_stack([z, constant]), None, patients)
    return {'slope': slope, 'intercept': _first_coefficient(targs, constant, z, patients)}


def _first_coefficient(targs: np.ndarray, x: np.ndarray, offset: np.ndarray | None, patients: np.ndarray) -> Estimate:
    """Fit a logistic regression on `x` (n, k) with a fixed `offset` (n,); return its first coefficient."""
    import statsmodels.api as sm

    _, groups = np.unique(patients, return_inverse=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            model = sm.GLM(targs.astype(float), x, sm.families.Binomial(), offset=offset)
            fit = model.fit(cov_type='cluster', cov_kwds={'groups': groups})
            low, high = fit.conf_int()[0]
        except Exception:  # statsmodels reports separation by warnings and errors of many types
            return make_estimate(None)
    return make_estimate(fit.params[0], low, high)


def reliability(targs: np.ndarray, p: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Group the images into up to `bins` bins of equal size by probability, for a reliability diagram.

    Returns:
        One row per bin: `n` images, mean probability `p`, and `share` of pneumonia with Wilson's interval `low` to
        `high`. Images with equal probabilities stay in one bin.
    """
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)))
    last_bin = max(len(edges) - 2, 0)
    bin_of_image = np.clip(np.searchsorted(edges, p, side='right') - 1, 0, last_bin)
    rows = []
    for index in np.unique(bin_of_image):
        inside = bin_of_image == index
        total = int(inside.sum())
        share = wilson_interval(int(targs[inside].sum()), total)
        rows.append((total, p[inside].mean(), share['value'], share['low'], share['high']))
    return pd.DataFrame(rows, columns=['n', 'p', 'share', 'low', 'high'])
