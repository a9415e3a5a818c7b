"""Patients drawn again and again: how figures vary where films of one patient belong together."""
from __future__ import annotations

import numpy as np

DRAWS, SEED = 2000, 0


def draw_patients(patients: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """How often each film counts in each draw, (draws, n): of `patients` (n,) as many as there are are drawn with
    replacement, each with all its films (cluster bootstrap; Field and Welsh 2007)."""
    names, of = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1/len(names)), size=draws)[:, of].astype(np.float64)


def count_draws(weights: np.ndarray, targs: np.ndarray, called: np.ndarray) -> tuple[np.ndarray, ...]:
    """tp, fp, fn and tn, each (draws,), where film i counts `weights[:, i]` times."""
    cells = np.stack([targs & called, ~targs & called, targs & ~called, ~targs & ~called])
    return tuple(cells.astype(np.float64) @ weights.T)


def rate_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted counts of true and of false positives, (draws, scores + 1), while the threshold falls from above the
    highest score to the lowest."""
    return tuple(np.pad(side[:, ::-1].cumsum(axis=1), ((0, 0), (1, 0))) for side in _by_score(weights, targs, scores))


def auc_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The AUC (draws,) of weighted films; NaN in a draw without one of the classes."""
    positive, negative = _by_score(weights, targs, scores)
    below = np.cumsum(negative, axis=1) - negative/2  # ties count half
    with np.errstate(invalid='ignore'):
        return (positive*below).sum(axis=1)/(positive.sum(axis=1)*negative.sum(axis=1))


def average_precision_draws(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The average precision (draws,) of weighted films, as scikit-learn defines it; NaN without a positive film."""
    tp, fp = rate_draws(weights, targs, scores)
    with np.errstate(invalid='ignore'):
        return (np.diff(tp)*tp[:, 1:]/np.maximum(tp + fp, 1)[:, 1:]).sum(axis=1)/tp[:, -1]


def mean_draws(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean (draws,) of the films' `values` (n,)."""
    return weights @ values/weights.sum(axis=1)


def deviation(draws: np.ndarray) -> float:
    """The standard error that `draws` show; NaN among them is left out. 0 where nothing is left, or nothing varies but
    the last digits."""
    known = draws[~np.isnan(draws)]
    error = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return error if error > 1e-9 else 0.0


def middle(draws: np.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 % of `draws`; NaN among them is left out, and nothing else gives None."""
    known = draws[~np.isnan(draws)]
    return tuple(np.percentile(known, [2.5, 97.5]).tolist()) if len(known) else (None, None)


def _by_score(weights: np.ndarray, targs: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of positives and of negatives at each different score, from the lowest: (draws, scores)."""
    order = np.argsort(scores, kind='stable')
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    ordered = weights[:, order]
    return tuple(np.add.reduceat(ordered*side[order], starts, axis=1) for side in (targs, ~targs))
