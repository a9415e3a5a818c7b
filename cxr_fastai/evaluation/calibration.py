"""Whether a probability means what it says: calibration measured, and mended by one temperature."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import xlog1py, xlogy

from cxr_fastai.evaluation.intervals import Estimate, estimate, mean_draws, middle, proportion
from cxr_fastai.inference.config import EDGE, logits

BINS = 15
NULL_DRAWS = 2000
COLDEST, HOTTEST = 0.05, 20


def fit_temperature(targs: np.ndarray, p: np.ndarray) -> float:
    """The temperature that gives `p` (n,) the least log loss on the boolean `targs` (n,). 1, which changes nothing,
    where a class is missing or the classes separate completely: the loss has no least value then."""
    if targs.all() or not targs.any() or p[targs].min() > p[~targs].max():
        return 1.0
    z = logits(p)
    loss = lambda t: float(np.mean(np.logaddexp(0, np.where(targs, -z, z) / np.exp(t))))
    return float(np.exp(minimize_scalar(loss, bounds=np.log([COLDEST, HOTTEST]), method='bounded').x))


def measure_calibration(targs: np.ndarray, p: np.ndarray, patients: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Brier score and log loss with the middle 95 % of the bootstrap `weights` (draws, n), the expected calibration
    error and what it would be by chance, and slope and intercept."""
    brier, loss = (p - targs) ** 2, log_losses(targs, p)
    with_interval = lambda values: estimate(values.mean(), *middle(mean_draws(weights, values)))
    return {
        'brier': with_interval(brier),
        'log_loss': with_interval(loss),
        'ece': {'value': calibration_error(targs, p)} | chance_error(p),
        **recalibrate(targs, p, patients),
    }


def log_losses(targs: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The cross-entropy (n,) of each image, in nats."""
    cut = np.clip(p, EDGE, 1 - EDGE)
    return -(xlogy(targs, cut) + xlog1py(~targs, -cut))


def calibration_error(targs: np.ndarray, p: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error over `bins` equal bins of probability (Naeini et al. 2015): the mean distance of
    share and mean probability, bins weighted by their images."""
    of = _bins(p, bins)
    return float(np.abs(np.bincount(of, targs - p, bins)).sum() / len(p))


def chance_error(p: np.ndarray, bins: int = BINS, draws: int = NULL_DRAWS, seed: int = 0) -> dict[str, float]:
    """What the error of `calibration_error` would be if each image were positive with just its probability `p` (n,):
    the `chance` mean over draws, and the `chance_high` that 95 % of them stay below. It is never 0."""
    rng, of = np.random.default_rng(seed), _bins(p, bins)
    member = (of[:, None] == np.arange(bins)).astype(np.float64)  # (n, bins)
    errors = [np.abs(((rng.random((100, len(p))) < p) - p) @ member).sum(axis=1) for _ in range(draws // 100)]
    found = np.concatenate(errors) / len(p)
    return {'chance': float(found.mean()), 'chance_high': float(np.percentile(found, 95))}


def recalibrate(targs: np.ndarray, p: np.ndarray, patients: np.ndarray) -> dict[str, Estimate]:
    """`slope` of a logistic regression of `targs` on the logit of `p` (Cox 1958), and `intercept` of one whose slope
    is held at 1 (calibration in the large): 1 and 0 where the probabilities are right. A slope below 1 means that they
    are too extreme, an intercept above 0 that they are too low. Standard errors grouped by patient; undefined where the
    classes separate or one is missing."""
    z, ones = logits(p), np.ones((len(p), 1))
    if targs.all() or not targs.any():
        return {'slope': estimate(None), 'intercept': estimate(None)}
    slope = _logistic(targs, np.column_stack([z, ones]), None, patients) if np.ptp(z) > 1e-9 else estimate(None)
    return {'slope': slope, 'intercept': _logistic(targs, ones, z, patients)}


def _logistic(targs: np.ndarray, x: np.ndarray, offset: np.ndarray | None, patients: np.ndarray) -> Estimate:
    """The first coefficient of a logistic regression on `x` (n, k) and a given `offset` (n,)."""
    import statsmodels.api as sm

    groups = np.unique(patients, return_inverse=True)[1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try:
            fitted = sm.GLM(targs.astype(float), x, sm.families.Binomial(), offset=offset).fit(
                cov_type='cluster', cov_kwds={'groups': groups}
            )
            return estimate(fitted.params[0], *fitted.conf_int()[0])
        except Exception:
            return estimate(None)  # separation is told by warnings and errors of many kinds


def reliability(targs: np.ndarray, p: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Images in `bins` of equal number by probability: columns n, p (their mean), and share, low, high (how many are
    pneumonia, with Wilson's interval). Equal probabilities stay in one bin."""
    edges = np.unique(np.quantile(p, np.linspace(0, 1, bins + 1)))
    of = np.clip(np.searchsorted(edges, p, side='right') - 1, 0, max(len(edges) - 2, 0))
    bins = [of == i for i in np.unique(of)]
    rows = [
        (int(here.sum()), p[here].mean(), *proportion(int(targs[here].sum()), int(here.sum())).values())
        for here in bins
    ]
    return pd.DataFrame(rows, columns=['n', 'p', 'share', 'low', 'high'])


def _bins(p: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((p * bins).astype(int), bins - 1)
