"""Metrics of a split with their intervals, computed from its predictions in the form of `metrics.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.data.splits import UNKNOWN_PATIENT, count_patients, describe_patients, unknown_patients
from cxr_fastai.evaluation.calibration import explain_temperature, measure_calibration
from cxr_fastai.evaluation.clusters import MIN_PATIENTS, clustered_auc, effective_size
from cxr_fastai.evaluation.intervals import (
    BOOTSTRAP_DRAWS,
    BOOTSTRAP_SEED,
    MIN_GROUP_SIZE,
    Estimate,
    auc_interval,
    average_precision_draws,
    count_draws,
    draw_patients,
    f1_interval,
    logit_interval,
    make_estimate,
    predictive_values,
    standard_error,
    wilson_interval,
)
from cxr_fastai.inference.config import temper

TARGETS = {'sensitivity': 0.95, 'specificity': 0.90}
"""Minimum values that the specification requires."""
PREVALENCES = (0.02, 0.10, 0.30)
"""Default prevalences of pneumonia for which predictive values are computed."""
SPECIFICATION_THRESHOLD = 0.5
"""Threshold of the specification; its metrics are reported next to those of the chosen threshold."""
FEW_PATIENTS = 10
"""Patients of a class below which the intervals come with a warning."""
Cells = Sequence[str]
"""Cells of the confusion matrix: `tp`, `fp`, `fn`, `tn`."""
RATES: dict[str, tuple[Cells, Cells]] = {
    'sensitivity': (['tp'], ['fn']),
    'specificity': (['tn'], ['fp']),
    'accuracy': (['tp', 'tn'], ['fp', 'fn']),
    'ppv': (['tp'], ['fp']),
    'npv': (['tn'], ['fn']),
}
"""Metrics that are proportions: the cells that count as correct, and those that count as incorrect."""
METRIC_NAMES = {'auc': 'AUC', 'ppv': 'PPV', 'npv': 'NPV', 'f1': 'F1', 'mcc': 'MCC', 'brier': 'Brier score'}
"""Names of metrics that differ from their keys."""


def name_metric(key: str) -> str:
    """Return the name of a metric from its key in `metrics.json`."""
    return METRIC_NAMES.get(key, key.replace('_', ' '))


def targets_and_probabilities(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets (n,), true for pneumonia, and the predicted probabilities of pneumonia (n,)."""
    targs = (predictions.label == VOCAB[POSITIVE]).to_numpy()
    return targs, predictions.p_pneumonia.to_numpy(float)


@dataclass(frozen=True)
class Sample:
    """Images with their targets (true for pneumonia), probabilities and patients, each (n,)."""

    targs: np.ndarray
    p: np.ndarray
    patients: np.ndarray

    @classmethod
    def from_predictions(cls, predictions: pd.DataFrame) -> Sample:
        """The images of a predictions table; an image of an unknown patient is its own patient."""
        targs, p = targets_and_probabilities(predictions)
        if 'patient' in predictions:
            patients = predictions.patient.astype(str).to_numpy()
        else:
            patients = np.array([f'{UNKNOWN_PATIENT}{i}' for i in range(len(predictions))])
        return cls(targs, p, patients)

    @cached_property
    def weights(self) -> np.ndarray:
        """Bootstrap weights of the images, (draws, n)."""
        return draw_patients(self.patients)

    @cached_property
    def grouped(self) -> bool:
        """True where a patient has several images, so that the images are not independent."""
        return self.count_patients() < len(self.patients)

    @cached_property
    def df(self) -> float:
        """Degrees of freedom of the bootstrap: the patients of the rarer class but one; infinite without groups."""
        if not self.grouped:
            return np.inf
        return min(self.count_patients(self.targs), self.count_patients(~self.targs)) - 1

    def logit_interval(self, value: float, error: float) -> Estimate:
        """A `value` in (0, 1) with its standard `error` over the draws; without an interval for too few patients."""
        return logit_interval(value, error, self.df) if self.df >= 1 else make_estimate(value)

    def count_patients(self, chosen: np.ndarray | None = None) -> int:
        """Number of patients, of all images or of the `chosen` ones (boolean, (n,))."""
        patients = self.patients if chosen is None else self.patients[chosen]
        return len(np.unique(patients))


class ConfusionMatrix:
    """Confusion matrix of a sample at a threshold: `images` (boolean, (n,)) and `counts` by cell."""

    def __init__(self, sample: Sample, threshold: float):
        targs = sample.targs
        positive = sample.p >= threshold
        self.sample = sample
        self.images = {
            'tp': targs & positive,
            'fp': ~targs & positive,
            'fn': targs & ~positive,
            'tn': ~targs & ~positive,
        }
        self.counts = {cell: int(images.sum()) for cell, images in self.images.items()}

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Weighted counts by cell in each bootstrap draw, (draws,)."""
        positive = self.images['tp'] | self.images['fp']
        counts = count_draws(self.sample.weights, self.sample.targs, positive)
        return dict(zip(('tp', 'fp', 'fn', 'tn'), counts, strict=True))

    def metrics(self) -> dict[str, Any]:
        """All `THRESHOLD_METRICS`, and the counts as `confusion`."""
        metrics: dict[str, Any] = {name: measure_one(self) for name, measure_one in THRESHOLD_METRICS.items()}
        metrics['confusion'] = {cell: self.counts[cell] for cell in ('tn', 'fp', 'fn', 'tp')}
        return metrics

    def rate(self, name: str) -> Estimate:
        """One of `RATES` with Wilson's interval for its effective size; without an interval if that is unknown."""
        correct, incorrect = RATES[name]
        count = self._count(correct)
        total = count + self._count(incorrect)
        size = self.effective_size(correct, incorrect)
        if size is None:
            return make_estimate(count / total)
        return wilson_interval(count, total, size)

    def rate_draws(self, name: str) -> np.ndarray:
        """One of `RATES` in each bootstrap draw, (draws,); NaN in draws without an image in its cells."""
        return self._proportion_draws(*RATES[name])

    def effective_size(self, correct: Cells, incorrect: Cells) -> float | None:
        """Effective sample size of the proportion correct / (correct + incorrect); see `clusters.effective_size`."""
        is_correct = np.any([self.images[cell] for cell in correct], axis=0)
        inside = is_correct | np.any([self.images[cell] for cell in incorrect], axis=0)
        return effective_size(is_correct[inside], self.sample.patients[inside])

    def _proportion_draws(self, correct: Cells, incorrect: Cells) -> np.ndarray:
        numerator = np.sum([self.draws[cell] for cell in correct], axis=0)
        rest = np.sum([self.draws[cell] for cell in incorrect], axis=0)
        with np.errstate(invalid='ignore'):
            proportions: np.ndarray = numerator / (numerator + rest)
        return proportions

    def _count(self, cells: Cells) -> int:
        return sum(self.counts[cell] for cell in cells)

    def f1(self) -> Estimate:
        """F1, the harmonic mean of sensitivity and PPV."""
        size = self.effective_size(['tp'], ['fp', 'fn'])
        f1 = f1_interval(self.counts['tp'], self.counts['fp'], self.counts['fn'], size)
        return make_estimate(f1['value']) if size is None else f1

    def balanced_accuracy(self) -> Estimate:
        """Mean of sensitivity and specificity; its interval on the logit scale, from the bootstrap of patients.

        Where it is 0 or 1 the interval is the mean of the two intervals.
        """
        sensitivity = self.rate('sensitivity')
        specificity = self.rate('specificity')
        if sensitivity['value'] is None or specificity['value'] is None:
            return make_estimate(None)
        mean = {bound: _mean_of_two(sensitivity[bound], specificity[bound]) for bound in sensitivity}
        error = standard_error((self.rate_draws('sensitivity') + self.rate_draws('specificity')) / 2)
        value = mean['value']
        if value is not None and 0 < value < 1 and error > 0:
            return self.sample.logit_interval(value, error)
        return mean

    def matthews_correlation(self) -> Estimate:
        """Matthews' correlation coefficient (1975); its interval on Fisher's z scale, from the bootstrap of patients.

        A value of -1 or 1 has no interval. Undefined where a row or column of the confusion matrix is empty.
        """
        value = float(_matthews(**{cell: np.float64(count) for cell, count in self.counts.items()}))
        if np.isnan(value):
            return make_estimate(None)
        error = standard_error(np.asarray(_matthews(**self.draws)))
        if abs(value) == 1 or error == 0 or self.sample.df < 1:
            return make_estimate(value)
        half_width = t.ppf(0.975, self.sample.df) * error / (1 - value**2)
        low, high = np.tanh(np.arctanh(value) + np.array([-half_width, half_width]))
        return make_estimate(value, low, high)


def _mean_of_two(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else (first + second) / 2


def _matthews(
    tp: np.ndarray | np.float64, fp: np.ndarray | np.float64, fn: np.ndarray | np.float64, tn: np.ndarray | np.float64
) -> np.ndarray | np.float64:
    with np.errstate(invalid='ignore'):
        return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def measure(
    predictions: pd.DataFrame,
    threshold: float,
    rule: str,
    temperature: float | None = None,
    prevalences: Sequence[float] = PREVALENCES,
    by: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute the metrics of one split in the form of `metrics.json`.

    Proportions have Wilson's interval and the AUC has DeLong's on the logit scale. Where patients have several images,
    the variation between patients determines the width of the intervals.

    Args:
        predictions: table with the columns `label`, `p_pneumonia`, and optionally `patient`.
        threshold: images with at least this probability are classified as pneumonia.
        rule: the rule that chose the threshold; it is stored with the metrics.
        temperature: for the metrics `calibrated`, which use probabilities after temperature scaling; None if none was
            fitted, so that they are unchanged.
        prevalences: prevalences in (0, 1) for which predictive values are computed.
        by: columns of the table that define subgroups.
    """
    sample = Sample.from_predictions(predictions)
    confusion = ConfusionMatrix(sample, threshold)
    at_specification = ConfusionMatrix(sample, SPECIFICATION_THRESHOLD)
    calibration = measure_calibration(sample.targs, sample.p, sample.patients)
    tempered = sample.p if temperature is None else temper(sample.p, temperature)
    calibrated = measure_calibration(sample.targs, tempered, sample.patients)
    calibrated['notes'] += explain_temperature(temperature)
    return {
        'n': len(sample.p),
        'positives': int(sample.targs.sum()),
        'patients': count_patients(predictions),
        'unknown_patients': int(unknown_patients(predictions).sum()),
        'patients_by_class': {
            VOCAB[POSITIVE - 1]: sample.count_patients(~sample.targs),
            VOCAB[POSITIVE]: sample.count_patients(sample.targs),
        },
        'threshold': threshold,
        'threshold_rule': rule,
        **confusion.metrics(),
        **{name: measure_one(sample) for name, measure_one in RANKING_METRICS.items()},
        'brier': calibration['brier']['value'],
        'log_loss': calibration['log_loss']['value'],
        'at_half': {'threshold': SPECIFICATION_THRESHOLD, **at_specification.metrics()},
        'prevalences': [at_prevalence(confusion, prevalence) for prevalence in prevalences],
        'calibration': calibration,
        'calibrated': {'temperature': temperature, **calibrated},
        'subgroups': [group for column in by for group in measure_groups(predictions, column, threshold)],
        'intervals': {'grouped_by_patient': sample.grouped, 'draws': BOOTSTRAP_DRAWS, 'seed': BOOTSTRAP_SEED},
    }


def is_complete(metrics: dict[str, Any]) -> bool:
    """Return whether the metrics of a split contain all that `measure` computes; older versions computed fewer."""
    return {*RANKING_METRICS, *THRESHOLD_METRICS, 'calibration', 'patients_by_class'} <= metrics.keys()


def describe_sample(metrics: dict[str, Any]) -> str:
    """Return the images and patients of a split in words, such as `624 images of 426 patients`."""
    return f'{counted(metrics["n"])} of {describe_patients(metrics["patients"], metrics["unknown_patients"])}'


def interval_warnings(metrics: dict[str, Any]) -> list[str]:
    """Return sentences about what limits the intervals of a split: unknown patients, and few patients of a class."""
    warnings = []
    n_unknown = metrics['unknown_patients']
    if n_unknown:
        images = 'all images' if n_unknown == metrics['n'] else f'{n_unknown:,} of {metrics["n"]:,} images'
        warnings.append(
            f'The patient of {images} is unknown. The intervals assume that each of these images is of another '
            'patient; if patients have several images, the intervals are too narrow.'
        )
    counts = metrics['patients_by_class']
    least = min(counts.values())
    if 0 < least < FEW_PATIENTS:
        text = ' and '.join(f'{n} of {label}' for label, n in counts.items())
        warnings.append(
            f'There are few patients: {text}. The intervals are less reliable than with at least {FEW_PATIENTS} '
            'patients of each class.'
        )
    if 0 < least < MIN_PATIENTS and metrics['intervals']['grouped_by_patient']:
        warnings.append(f'Where all images are of fewer than {MIN_PATIENTS} patients, there is no interval.')
    return warnings


def measure_auc(sample: Sample) -> Estimate:
    """Area under the ROC curve: `auc_interval`, or `clustered_auc` where patients have several images."""
    if sample.grouped:
        return clustered_auc(sample.targs, sample.p, sample.patients)
    return auc_interval(sample.targs, sample.p)


def measure_average_precision(sample: Sample) -> Estimate:
    """Average precision as scikit-learn defines it; its interval on the logit scale, from the bootstrap of patients.

    A value of 1 has no interval. Undefined for images of a single class.
    """
    from sklearn.metrics import average_precision_score

    if sample.targs.all() or not sample.targs.any():
        return make_estimate(None)
    value = float(average_precision_score(sample.targs, sample.p))
    error = standard_error(average_precision_draws(sample.weights, sample.targs, sample.p))
    return sample.logit_interval(value, error) if error > 0 and value < 1 else make_estimate(value)


def at_prevalence(confusion: ConfusionMatrix, prevalence: float) -> dict[str, Any]:
    """PPV and NPV in a population with another `prevalence` of pneumonia, in (0, 1)."""
    ppv, npv = predictive_values(
        confusion.rate('sensitivity'),
        confusion.rate('specificity'),
        confusion.effective_size(*RATES['sensitivity']),
        confusion.effective_size(*RATES['specificity']),
        prevalence,
    )
    return {'prevalence': prevalence, 'ppv': ppv, 'npv': npv}


def measure_groups(predictions: pd.DataFrame, column: str, threshold: float) -> list[dict[str, Any]]:
    """Compute sensitivity, specificity and AUC in each group of a `column`.

    The AUC of a group with a single class is computed against all images of the other class. A rate of fewer than
    `MIN_GROUP_SIZE` images is undefined; groups of fewer images are only counted, in a row with `suppressed`.
    """
    groups = predictions[column].fillna('missing').astype(str)
    sizes = groups.value_counts()
    large_groups = sorted(sizes.index[sizes >= MIN_GROUP_SIZE])
    rows = [_measure_group(predictions, column, name, groups == name, threshold) for name in large_groups]
    suppressed = int((sizes < MIN_GROUP_SIZE).sum())
    if suppressed:
        rows.append({'column': column, 'group': None, 'suppressed': suppressed})
    return rows


def _measure_group(
    predictions: pd.DataFrame, column: str, name: str, inside: pd.Series[bool], threshold: float
) -> dict[str, Any]:
    group = predictions[inside]
    labels = set(group.label)
    both_classes = group if len(labels) > 1 else predictions[inside | ~predictions.label.isin(labels)]
    confusion = ConfusionMatrix(Sample.from_predictions(group), threshold)
    positives = confusion.counts['tp'] + confusion.counts['fn']
    rates = {}
    for rate, total in (('sensitivity', positives), ('specificity', len(group) - positives)):
        rates[rate] = confusion.rate(rate) if total >= MIN_GROUP_SIZE else make_estimate(None)
    return {
        'column': column,
        'group': name,
        'n': len(group),
        'positives': positives,
        **rates,
        'auc': measure_auc(Sample.from_predictions(both_classes)),
    }


RANKING_METRICS: dict[str, Callable[[Sample], Estimate]] = {
    'auc': measure_auc,
    'average_precision': measure_average_precision,
}
"""Metrics without a threshold. A row here appears in `metrics.json`, in the terminal and in the report."""
THRESHOLD_METRICS: dict[str, Callable[[ConfusionMatrix], Estimate]] = {
    **{name: partial(ConfusionMatrix.rate, name=name) for name in RATES},
    'f1': ConfusionMatrix.f1,
    'balanced_accuracy': ConfusionMatrix.balanced_accuracy,
    'mcc': ConfusionMatrix.matthews_correlation,
}
"""Metrics at a threshold, which likewise appear everywhere."""
