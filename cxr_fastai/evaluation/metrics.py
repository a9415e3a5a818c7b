"""Predictions become metrics: every figure of a split with its interval, in the form of `metrics.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.evaluation.calibration import measure_calibration
from cxr_fastai.evaluation.intervals import (
    DRAWS,
    SEED,
    Z95,
    Estimate,
    auc_draws,
    average_precision_draws,
    count_draws,
    deviation,
    draw_patients,
    estimate,
    f1,
    newcombe,
    on_logit_scale,
    predictive_values,
    proportion,
    roc_auc,
)
from cxr_fastai.inference.config import temper

TARGETS = {'sensitivity': 0.95, 'specificity': 0.90}
"""What the specification asks for."""
PREVALENCES = (0.02, 0.10, 0.30)
HALF = 0.5
"""The threshold of the specification, whose figures stand beside those of the chosen one."""
FEW = 10
"""Images in a group below which its figures would say little and might point at somebody."""
SHARES = {
    'sensitivity': (('tp',), ('fn',)),
    'specificity': (('tn',), ('fp',)),
    'accuracy': (('tp', 'tn'), ('fp', 'fn')),
    'ppv': (('tp',), ('fp',)),
    'npv': (('tn',), ('fn',)),
}
"""Figure -> the cells of the confusion matrix that are right, and those that are wrong."""


def truth(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image shows pneumonia, and the probability given to it: (n,) and (n,)."""
    return (predictions.label == VOCAB[POSITIVE]).to_numpy(), predictions.p_pneumonia.to_numpy(float)


@dataclass(frozen=True)
class Sample:
    """Images with their truth `targs` (true: pneumonia), probability `p` and patients, each (n,)."""

    targs: np.ndarray
    p: np.ndarray
    patients: np.ndarray

    @classmethod
    def of(cls, predictions: pd.DataFrame) -> Sample:
        """The sample of a predictions table; without a column patient each image is a patient of its own."""
        patients = predictions['patient'] if 'patient' in predictions else pd.Series(range(len(predictions)))
        return cls(*truth(predictions), patients.astype(str).to_numpy())

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each image counts in each draw of patients, (draws, n)."""
        return draw_patients(self.patients)

    @cached_property
    def grouped(self) -> bool:
        """Whether a patient has several images, so that images are not independent."""
        return self.count(self.targs | True) < len(self.patients)

    def count(self, chosen: np.ndarray) -> int:
        """The patients of the `chosen` images (n,)."""
        return len(np.unique(self.patients[chosen]))


class Calls:
    """The confusion matrix of a `sample` at a `threshold`: which images are in each cell, how many, and in each draw."""

    def __init__(self, sample: Sample, threshold: float):
        targs, called = sample.targs, sample.p >= threshold
        self.sample = sample
        self.images = {'tp': targs & called, 'fp': ~targs & called, 'fn': targs & ~called, 'tn': ~targs & ~called}
        self.n = {cell: int(images.sum()) for cell, images in self.images.items()}
        self.draws = dict(zip(self.images, count_draws(sample.weights, targs, called), strict=True))

    def share(self, right: Sequence[str], wrong: Sequence[str]) -> Estimate:
        """The share of the cells `right` among them and `wrong`, with Wilson's interval."""
        k = sum(self.n[cell] for cell in right)
        return proportion(k, k + sum(self.n[cell] for cell in wrong), self.effective(right, wrong))

    def share_draws(self, right: Sequence[str], wrong: Sequence[str]) -> np.ndarray:
        """That share in each draw, (draws,); NaN where no image is in any of the cells."""
        k, rest = (np.sum([self.draws[cell] for cell in cells], axis=0) for cells in (right, wrong))
        with np.errstate(invalid='ignore'):
            return k / (k + rest)

    def effective(self, right: Sequence[str], wrong: Sequence[str]) -> float:
        """How many independent images would make that share vary as much as the draws of patients do: at most the images
        that there are (Kish's effective sample size). Where it does not vary, as a share of 0 or 1, the patients."""
        k, n = sum(self.n[cell] for cell in right), sum(self.n[cell] for cell in (*right, *wrong))
        if not self.sample.grouped:
            return n
        error = deviation(self.share_draws(right, wrong)) if 0 < k < n else 0.0
        if error:
            return min(n, k / n * (1 - k / n) / error**2)
        return self.sample.count(np.any([self.images[cell] for cell in (*right, *wrong)], axis=0))

    def rates(self) -> dict[str, Any]:
        """Every figure of `AT_A_THRESHOLD`, and the counts."""
        return {
            **{name: figure(self) for name, figure in AT_A_THRESHOLD.items()},
            'confusion': {cell: self.n[cell] for cell in ('tn', 'fp', 'fn', 'tp')},
        }

    def f1(self) -> Estimate:
        """The harmonic mean of sensitivity and PPV."""
        return f1(*(self.n[cell] for cell in ('tp', 'fp', 'fn')), self.effective(['tp'], ['fp', 'fn']))

    def balanced_accuracy(self) -> Estimate:
        """The mean of sensitivity and specificity, its interval on the logit scale from the draws of patients."""
        sensitivity, specificity = (self.share(*SHARES[name]) for name in TARGETS)
        if sensitivity['value'] is None or specificity['value'] is None:
            return estimate(None)
        middle = {name: (sensitivity[name] + specificity[name]) / 2 for name in sensitivity}
        error = deviation(sum(self.share_draws(*SHARES[name]) for name in TARGETS) / 2)
        return on_logit_scale(middle['value'], error) if 0 < middle['value'] < 1 and error else middle

    def correlation(self) -> Estimate:
        """Matthews' correlation coefficient (1975), its interval on Fisher's z scale; None for the interval where it is
        -1 or 1, and for all where a margin is empty."""
        value = _mcc(**{cell: np.float64(n) for cell, n in self.n.items()})
        if np.isnan(value):
            return estimate(None)
        error = deviation(_mcc(**self.draws))
        if abs(value) == 1 or not error:
            return estimate(value)
        half = Z95 * error / (1 - value**2)
        return estimate(value, *np.tanh(np.arctanh(value) + np.array([-half, half])))


def measure(
    predictions: pd.DataFrame,
    threshold: float,
    rule: str,
    temperature: float = 1.0,
    prevalences: Sequence[float] = PREVALENCES,
    by: Sequence[str] = (),
) -> dict[str, Any]:
    """The metrics of one split, in the form of `metrics.json`, at `threshold`, which `rule` chose, and at .5 beside it.

    Intervals are Wilson's for proportions and DeLong's on the logit scale for the AUC. Where patients have several
    images they are as wide as the bootstrap of patients shows. `by` names columns of the table that tell groups apart.
    """
    sample = Sample.of(predictions)
    chosen = Calls(sample, threshold)
    calibration, tempered = (
        measure_calibration(sample.targs, p, sample.patients, sample.weights)
        for p in (sample.p, temper(sample.p, temperature))
    )
    return {
        'n': len(sample.p),
        'positives': int(sample.targs.sum()),
        'patients': sample.count(sample.targs | True),
        'threshold': threshold,
        'threshold_rule': rule,
        **chosen.rates(),
        **{name: figure(sample) for name, figure in OVERALL.items()},
        'brier': calibration['brier']['value'],
        'log_loss': calibration['log_loss']['value'],
        'at_half': {'threshold': HALF, **Calls(sample, HALF).rates()},
        'prevalences': [at_prevalence(chosen, prevalence) for prevalence in prevalences],
        'calibration': calibration,
        'calibrated': {'temperature': temperature, **tempered},
        'subgroups': [group for column in by for group in measure_groups(predictions, column, threshold)],
        'intervals': {'grouped_by_patient': sample.grouped, 'draws': DRAWS, 'seed': SEED},
    }


def is_complete(metrics: dict[str, Any]) -> bool:
    """Whether the `metrics` of a split have all the figures of `measure`; those of an older version may lack some."""
    return {*OVERALL, *AT_A_THRESHOLD, 'calibration'} <= metrics.keys()


def area(sample: Sample) -> Estimate:
    """The area under the ROC curve: DeLong's interval, or as wide as the bootstrap shows where patients have several
    images; by Newcombe's method of the number of patients where that shows nothing."""
    found = roc_auc(sample.targs, sample.p)
    if not sample.grouped or found['value'] is None:
        return found
    error = deviation(auc_draws(sample.weights, sample.targs, sample.p))
    if error and 0 < found['value'] < 1:
        return on_logit_scale(found['value'], error)
    return newcombe(found['value'], sample.count(sample.targs), sample.count(~sample.targs))


def average_precision(sample: Sample) -> Estimate:
    """scikit-learn's average precision, its interval on the logit scale from the bootstrap of patients; None for the
    interval where it is 1, and for all without an image of one class."""
    from sklearn.metrics import average_precision_score

    if sample.targs.all() or not sample.targs.any():
        return estimate(None)
    value = float(average_precision_score(sample.targs, sample.p))
    error = deviation(average_precision_draws(sample.weights, sample.targs, sample.p))
    return on_logit_scale(value, error) if error and value < 1 else estimate(value)


def at_prevalence(calls: Calls, prevalence: float) -> dict[str, Any]:
    """PPV and NPV among images of which the share `prevalence` shows pneumonia."""
    rates = [calls.share(*SHARES[name]) for name in ('sensitivity', 'specificity')]
    sizes = [calls.effective(*SHARES[name]) for name in ('sensitivity', 'specificity')]
    ppv, npv = predictive_values(*rates, *sizes, prevalence)
    return {'prevalence': prevalence, 'ppv': ppv, 'npv': npv}


def measure_groups(predictions: pd.DataFrame, column: str, threshold: float) -> list[dict[str, Any]]:
    """Sensitivity, specificity and AUC in each group that `column` tells apart; the AUC of a group of one class is
    against all images of the other. A rate of fewer than `FEW` images is not told; groups of fewer are counted in a row.
    """
    groups = predictions[column].fillna('missing').astype(str)
    sizes = groups.value_counts()
    rows = [
        _measure_group(predictions, column, name, groups == name, threshold)
        for name in sorted(sizes.index[sizes >= FEW])
    ]
    if small := int((sizes < FEW).sum()):
        rows.append({'column': column, 'group': None, 'suppressed': small})
    return rows


def _measure_group(
    predictions: pd.DataFrame, column: str, name: str, chosen: pd.Series, threshold: float
) -> dict[str, Any]:
    inside = predictions[chosen]
    labels = set(inside.label)
    both = inside if len(labels) > 1 else predictions[chosen | ~predictions.label.isin(labels)]
    calls = Calls(Sample.of(inside), threshold)
    told = {
        rate: calls.share(*SHARES[rate])
        if sum(calls.n[cell] for cells in SHARES[rate] for cell in cells) >= FEW
        else estimate(None)
        for rate in TARGETS
    }
    return {
        'column': column,
        'group': name,
        'n': len(inside),
        'positives': calls.n['tp'] + calls.n['fn'],
        **told,
        'auc': area(Sample.of(both)),
    }


def _mcc(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray, tn: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


OVERALL: dict[str, Callable[[Sample], Estimate]] = {'auc': area, 'average_precision': average_precision}
"""Figure over all thresholds -> how it is estimated; a row is in `metrics.json`, the terminal and the report."""
AT_A_THRESHOLD: dict[str, Callable[[Calls], Estimate]] = {
    **{name: partial(Calls.share, right=right, wrong=wrong) for name, (right, wrong) in SHARES.items()},
    'f1': Calls.f1,
    'balanced_accuracy': Calls.balanced_accuracy,
    'mcc': Calls.correlation,
}
"""The same for figures that depend on the threshold."""

NAMES = {'auc': 'AUC', 'ppv': 'PPV', 'npv': 'NPV', 'f1': 'F1', 'mcc': 'MCC', 'brier': 'Brier score'}
"""Figures that are not called by their own name."""


def name_figure(name: str) -> str:
    """A figure's key of `metrics.json` in words."""
    return NAMES.get(name, name.replace('_', ' '))
