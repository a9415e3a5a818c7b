"""One pass over a split gives the predictions table; every figure is derived from it, with its interval."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata

from cxr_fastai.core import POSITIVE, VOCAB, FilmError, UsageError, write_json
from cxr_fastai.inference import Predictor
from cxr_fastai.items import count_films, data_root, film_root, read_items
from cxr_fastai.run import Run

COLUMNS = ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']
TARGETS = {'sensitivity': 0.95, 'specificity': 0.90}
"""What the specification asks for."""
Z95 = norm.ppf(0.975)
Estimate = dict[str, float | None]
"""`value`, and `low` and `high` of its 95 % interval; None where there is nothing to estimate from."""


def evaluate(run: Run, data: Path | None = None, split: str = 'test', batch_size: int = 32,
             limit: int | None = None, console: Console | None = None) -> dict[str, Any]:
    """Predict the films of `split` once, write `predictions.csv` and `metrics.json` (other splits in them are kept),
    and return the split's metrics. Raises `UsageError` for a split without films, `FilmError` for an unreadable film.
    """
    root, items = find_split(run, data, split, limit)
    predictor = Predictor.load(run.path)
    predictions = predict_items(predictor, items, root, batch_size, console)
    metrics = measure(predictions, predictor.config.threshold, predictor.config.threshold_rule)
    run.write_split('predictions.csv', predictions, split)
    write_json(run/'metrics.json', run.metrics | {split: metrics})
    return metrics


def find_split(run: Run, data: Path | None, split: str, limit: int | None = None) -> tuple[Path, pd.DataFrame]:
    """The films' folder and the items of `split` in it.

    Where the run's own train or valid films are there, also in a copy of the folder, those are meant: never a film
    that it trained on as valid. Without `data` the folder is the one it was trained on. Raises `UsageError`.
    """
    root = data_root(data or (run.films if run.films and run.films.exists() else None))
    own = run.items[(run.items.split == split) & (split != 'test')]
    there = [(film_root(root)/path).exists() for path in own.path]
    items = own if there and all(there) else read_items(root)
    chosen = items[items.split == split]
    if (known := chosen.path.isin(run.items.path) & (items is not own) & (split != 'test')).any():
        raise UsageError(f'{root}: {known.sum()} films of its {split} split are among those of the run, but not all of '
                         "the run's are there: name the folder it was trained on, whole.")
    if limit is not None: chosen = chosen.groupby('label', sort=False).head(limit)
    if chosen.empty:
        found = count_films(items).sum(axis=1)
        raise UsageError(f'{root}: the split {split} has no films; found '
                         f'{", ".join(f"{name} {n}" for name, n in found.items())}: choose another --split.')
    return film_root(root), chosen.reset_index(drop=True)


def predict_items(predictor: Predictor, items: pd.DataFrame, root: Path, batch_size: int = 32,
                  console: Console | None = None) -> pd.DataFrame:
    """The predictions table of `items`: one row a film, with the cross-entropy of its label as `loss`.

    Raises `FilmError` naming the unreadable films, since figures over the rest would be of another set.
    """
    rows = pd.DataFrame(predictor.predict([root/path for path in items.path], batch_size, console))
    if (bad := rows[rows.status != 'ok']).size:
        more = f' (and {len(bad) - 1} more: `cxr-fastai predict` lists them)' if len(bad) > 1 else ''
        raise FilmError(f'{bad.path.iloc[0]}: {bad.message.iloc[0]}{more}. Remove or mend it, then evaluate again.',
                        bad.code.iloc[0])
    p = rows.p_pneumonia.astype(float)
    right = p.where(items.label == VOCAB[POSITIVE], 1 - p).clip(lower=np.finfo(float).tiny)
    return items.assign(p_pneumonia=p, prediction=rows.prediction, loss=-np.log(right))[COLUMNS]


def measure(predictions: pd.DataFrame, threshold: float, rule: str) -> dict[str, Any]:
    """The metrics of one split, in the form of `metrics.json`.

    Proportions have Wilson intervals, the AUC DeLong's on the logit scale, F1 Wilson's on the Jaccard index.
    """
    targs = (predictions.label == VOCAB[POSITIVE]).to_numpy()
    p = predictions.p_pneumonia.to_numpy(float)
    called = p >= threshold
    tp, fp, fn, tn = (int(np.sum(a & b)) for a in (called, ~called) for b in (targs, ~targs))
    return {'n': len(targs), 'positives': int(targs.sum()), 'threshold': threshold, 'threshold_rule': rule,
            'accuracy': proportion(tp + tn, len(targs)), 'auc': roc_auc(targs, p),
            'sensitivity': proportion(tp, tp + fn), 'specificity': proportion(tn, tn + fp),
            'ppv': proportion(tp, tp + fp), 'npv': proportion(tn, tn + fn), 'f1': f1(tp, fp, fn),
            'brier': float(np.mean((p - targs)**2)), 'confusion': {'tn': tn, 'fp': fp, 'fn': fn, 'tp': tp}}


def proportion(k: int, n: int) -> Estimate:
    """k of n with Wilson's 95 % interval (Wilson 1927, without continuity correction)."""
    if n == 0: return _estimate(None, None, None)
    interval = binomtest(k, n).proportion_ci(method='wilson')
    return _estimate(k/n, interval.low, interval.high)


def f1(tp: int, fp: int, fn: int) -> Estimate:
    """F1 with the interval of J = tp/(tp + fp + fn), a proportion, mapped through F1 = 2J/(1 + J)."""
    return {name: value if value is None else 2*value/(1 + value)
            for name, value in proportion(tp, tp + fp + fn).items()}


def roc_auc(targs: np.ndarray, scores: np.ndarray) -> Estimate:
    """Area under the ROC curve of `scores` (n,) for the boolean `targs` (n,), with a 95 % interval.

    DeLong's variance (1988; ranks as in Sun and Xu 2014) on the logit scale. Where that variance is 0 or undefined
    (classes that separate completely, equal scores, one film of a class) Newcombe's method 5 (2006) instead, one-sided
    for an AUC of 0 or 1. None for one class only.
    """
    positive, negative = scores[targs], scores[~targs]
    m, n = len(positive), len(negative)
    if not m or not n: return _estimate(None, None, None)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive))/n        # share of negatives below each positive
    below = 1 - (ranks[m:] - rankdata(negative))/m    # share of positives above each negative
    auc = float(above.mean())
    variance = above.var(ddof=1)/m + below.var(ddof=1)/n if min(m, n) > 1 else 0.0
    if auc in (0.0, 1.0) or variance == 0: return _newcombe(auc, m, n)
    half = Z95*np.sqrt(variance)/(auc*(1 - auc))
    return _estimate(auc, *expit(logit(auc) + np.array([-half, half])))


def roc_curve(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates along the thresholds, from (0, 0) to (1, 1)."""
    from sklearn.metrics import roc_curve as curve
    fpr, tpr, _ = curve(predictions.label == VOCAB[POSITIVE], predictions.p_pneumonia)
    return fpr, tpr


def _newcombe(auc: float, m: int, n: int) -> Estimate:
    """The AUCs at which this one lies just z standard errors off, by Newcombe's variance of an AUC t."""
    z, half = norm.ppf(0.95 if auc in (0.0, 1.0) else 0.975), (m + n)/2

    def gap(t: float) -> float:
        variance = t*(1 - t)/(m*n)*(2*half - 1 - (3*half - 3)/((2 - t)*(1 + t)))
        return (auc - t)**2 - z**2*variance
    edge = 1e-12
    low = brentq(gap, edge, min(auc, 1 - edge)) if auc > 0 else 0.0
    high = brentq(gap, max(auc, edge), 1 - edge) if auc < 1 else 1.0
    return _estimate(auc, low, high)


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    return {name: v if v is None else float(v) for name, v in (('value', value), ('low', low), ('high', high))}
