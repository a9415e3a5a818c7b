"""One pass over a split gives the predictions table; every figure is derived from it, with its interval."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm, rankdata

from cxr_fastai.core import POSITIVE, VOCAB, FilmError, Run, UsageError, write_csv, write_json
from cxr_fastai.inference import Predictor
from cxr_fastai.items import count_films, data_root, film_root, read_items

COLUMNS = ['path', 'label', 'split', 'patient', 'p_pneumonia', 'prediction', 'loss']
TARGETS = {'sensitivity': 0.95, 'specificity': 0.90}
"""What the specification asks for."""
Z95 = norm.ppf(0.975)
Estimate = dict[str, float | None]
"""`value`, and `low` and `high` of its 95 % interval; None where there is nothing to estimate from."""


def evaluate(run: Run, data: Path | None = None, split: str = 'test', batch_size: int = 32,
             limit: int | None = None) -> dict[str, Any]:
    """Predict the films of `split` once, write `predictions.csv` and `metrics.json` (other splits in them are kept),
    and return the split's metrics. Raises `UsageError` for a split without films, `FilmError` for an unreadable film.
    """
    root, items = find_split(run, data, split, limit)
    predictor = Predictor.load(run.path)
    predictions = predict_items(predictor, items, root, batch_size)
    metrics = measure(predictions, predictor.config.threshold, predictor.config.threshold_rule)
    write_csv(run/'predictions.csv', _merge_rows(run, predictions, split))
    write_json(run/'metrics.json', (run.metrics if (run/'metrics.json').exists() else {}) | {split: metrics})
    return metrics


def find_split(run: Run, data: Path | None, split: str, limit: int | None = None) -> tuple[Path, pd.DataFrame]:
    """The films' folder and the items of `split`: of the folder `data` as it is laid out, or of the run itself.

    The run's own train and valid films are always the ones it was trained with, also when `data` names its folder.
    """
    own = run.noted('start').get('data')
    root = data_root(data or (Path(own) if own and Path(own).exists() else None))
    trained_on = data is None or str(root.resolve()) == own
    items = run.items if trained_on and split != 'test' else read_items(root)
    chosen = items[items.split == split]
    if limit is not None: chosen = chosen.groupby('label', sort=False).head(limit)
    if chosen.empty:
        raise UsageError(f'{root}: the split {split} has no films; found '
                         f'{", ".join(f"{name} {n}" for name, n in count_films(items).sum(axis=1).items())}.')
    return film_root(root), chosen.reset_index(drop=True)


def predict_items(predictor: Predictor, items: pd.DataFrame, root: Path, batch_size: int = 32) -> pd.DataFrame:
    """The predictions table of `items`: one row a film, with the cross-entropy of its label as `loss`.

    Raises `FilmError` naming the unreadable films, since figures over the rest would be of another set.
    """
    rows = pd.DataFrame(predictor.predict([root/path for path in items.path], batch_size))
    if (bad := rows[rows.status != 'ok']).size:
        more = f' (and {len(bad) - 1} more: `cxr-fastai predict` lists them)' if len(bad) > 1 else ''
        raise FilmError(f'{bad.message.iloc[0]}{more}. Remove or mend it, then evaluate again.', bad.code.iloc[0])
    p = rows.p_pneumonia.astype(float)
    right = p.where(items.label == VOCAB[POSITIVE], 1 - p).clip(lower=np.finfo(np.float32).tiny)
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

    DeLong's variance (1988; ranks as in Sun and Xu 2014) on the logit scale. Where the classes separate completely the
    variance is 0 and tells nothing: then one-sided, Newcombe's method 5 (2006) at that end. None for one class only.
    """
    positive, negative = scores[targs], scores[~targs]
    m, n = len(positive), len(negative)
    if not m or not n: return _estimate(None, None, None)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive))/n        # share of negatives below each positive
    below = 1 - (ranks[m:] - rankdata(negative))/m    # share of positives above each negative
    auc = float(above.mean())
    if auc in (0.0, 1.0): return _one_sided(auc, m, n)
    if min(m, n) == 1: return _estimate(auc, None, None)
    spread = np.sqrt(above.var(ddof=1)/m + below.var(ddof=1)/n)/(auc*(1 - auc))
    return _estimate(auc, *expit(logit(auc) + np.array([-1, 1])*Z95*spread))


def roc_curve(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates along the thresholds, from (0, 0) to (1, 1)."""
    from sklearn.metrics import roc_curve as curve
    fpr, tpr, _ = curve(predictions.label == VOCAB[POSITIVE], predictions.p_pneumonia)
    return fpr, tpr


def _one_sided(auc: float, m: int, n: int) -> Estimate:
    """The far limit at which an AUC this extreme is just 5 % likely, by Newcombe's variance of the AUC."""
    z, half = norm.ppf(0.95), (m + n)/2

    def gap(t: float) -> float:
        variance = t*(1 - t)/(m*n)*(2*half - 1 - (3*half - 3)/((2 - t)*(1 + t)))
        return (1 - t) - z*np.sqrt(variance)
    limit = brentq(gap, 1e-9, 1 - 1e-9)
    return _estimate(auc, limit, 1.0) if auc == 1 else _estimate(auc, 0.0, 1 - limit)


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    return {name: v if v is None else float(v) for name, v in (('value', value), ('low', low), ('high', high))}


def _merge_rows(run: Run, predictions: pd.DataFrame, split: str) -> pd.DataFrame:
    if not (run/'predictions.csv').exists(): return predictions
    old = run.predictions
    return pd.concat([old[old.split != split], predictions], ignore_index=True)
