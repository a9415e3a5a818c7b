"""Decision thresholds: rules that choose one on the validation images, and the trade-offs over all thresholds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.progress import are, counted
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.data.splits import UNKNOWN_PATIENT, count_patients, unknown_patients
from cxr_fastai.evaluation.calibration import explain_temperature, fit_temperature
from cxr_fastai.evaluation.intervals import draw_patients, roc_draws
from cxr_fastai.evaluation.metrics import (
    ConfusionMatrix,
    Sample,
    at_prevalence,
    targets_and_probabilities,
)
from cxr_fastai.inference.config import logits
from cxr_fastai.inference.decision import Decision

MIN_DECIMALS = 2
MAX_DECIMALS = 17
"""Decimals of a threshold: as few as separate it from the scores on both sides."""
TOLERANCE = 1e-9
"""Rounding error of sums that are compared."""


def decide(valid: pd.DataFrame, rule: str, model: str = '', tta: bool = False) -> Decision:
    """Choose the threshold by `rule`, and fit the temperature, on the predictions of the validation images.

    The rules are `fixed:0.5` (the number itself), `sensitivity:0.95` (the highest threshold that keeps this
    sensitivity, with a margin for the number of patients), `youden` (the greatest sensitivity + specificity) and
    `cost:10/1` (the least cost, where a missed pneumonia costs 10 and a false alarm 1). With the ending `@shift` the
    predictions are those of the split `shift`.

    Args:
        valid: predictions table of the validation images.
        rule: name and numbers of the rule.
        model: SHA-256 of the network, which is stored with the decision.
        tta: whether the predictions are means over test-time views, which is stored, too.

    Raises `UsageError` for an unknown rule, and for a rule that needs images of both classes where one is missing.
    """
    choose, numbers = parse_rule(rule)
    sample = Sample.from_predictions(valid)
    targs, p = sample.targs, sample.p
    if choose is not fixed and (targs.all() or not targs.any()):
        raise UsageError(
            f'--threshold {rule}: no threshold can be chosen, because the validation images are all '
            f'{valid.label.iloc[0]}. Use validation images of both classes, or fixed:T.'
        )
    threshold, margin = choose(sample, *numbers)
    if deciding_split(rule) == SHIFT:
        margin = margin.replace('validation images', 'soft images')
    confusion = ConfusionMatrix(sample, threshold)
    performance = {
        'n': len(p),
        'positives': int(targs.sum()),
        'patients': count_patients(valid),
        'unknown_patients': int(unknown_patients(valid).sum()),
        'sensitivity': confusion.rate('sensitivity'),
        'specificity': confusion.rate('specificity'),
    }
    temperature = fit_temperature(targs, p)
    for sentence in explain_temperature(temperature):
        warnings.warn(sentence, CXRWarning, stacklevel=2)
    return Decision(threshold, rule, temperature, model, margin, performance, tta=tta)


def fixed(sample: Sample, threshold: float) -> tuple[float, str]:
    """Return the `threshold` itself."""
    return threshold, ''


def keep_sensitivity(sample: Sample, target: float) -> tuple[float, str]:
    """Choose the highest threshold with an expected sensitivity of at least `target` on the images of a new patient.

    This is conformal risk control (Angelopoulos et al. 2022), where the loss of a patient is the share of their images
    of pneumonia that are missed. If the losses of n patients sum to L, that of a new patient who is exchangeable with
    them is expected to be at most (L + 1)/(n + 1). So the threshold is the highest with (L + 1)/(n + 1) <= 1 - target.
    With one image per patient it is the order statistic of the scores as in conformal prediction.

    Returns:
        The threshold, and the margin in words. With too few patients for the `target`, no image is missed.
    """
    scores = sample.p[sample.targs]
    patients, patient_of_image, images_of_patient = np.unique(
        sample.patients[sample.targs], return_inverse=True, return_counts=True
    )
    n = len(patients)
    order = np.argsort(scores, kind='stable')
    ascending = scores[order]
    losses = np.concatenate([[0], np.cumsum(1 / images_of_patient[patient_of_image[order]])])
    missed = losses[np.searchsorted(ascending, ascending)]  # the sum of losses with each score as the threshold
    allowed = (1 - target) * (n + 1) - 1
    below = np.flatnonzero(missed <= allowed + TOLERANCE)
    chosen = below[-1] if len(below) else 0
    threshold = _below(ascending[chosen], sample.p)
    expected = _round_down(1 - (missed[chosen] + 1) / (n + 1))
    n_unknown = sum(patient.startswith(UNKNOWN_PATIENT) for patient in patients)
    unit = 'image' if n_unknown == n else 'patient'
    unknown = _explain_unknown(n_unknown, n)
    if not len(below):
        needed = math.ceil(1 / (1 - target) - 1 - TOLERANCE)
        return threshold, (
            f'Warning: {counted(n, unit)} with pneumonia among the validation images {are(n)} too few for a '
            f'sensitivity of {target:g}, which requires {needed}. All of them are classified as pneumonia, and the '
            f'expected sensitivity for a new {unit} is at least {expected:.3f}.{unknown}'
        )
    detected = int((scores >= threshold).sum())
    return threshold, (
        f'{detected:,} of {len(scores):,} validation images of pneumonia are classified as pneumonia '
        f'({detected / len(scores):.3f}), so that the expected sensitivity for a new {unit}, estimated from '
        f'{counted(n, unit)}, is at least {expected:.3f}.{unknown}'
    )


def _round_down(share: float) -> float:
    """Return `share` with three decimals, not above it."""
    return math.floor(1000 * share + TOLERANCE) / 1000


def _explain_unknown(n_unknown: int, n: int) -> str:
    """Return what `keep_sensitivity` cannot promise if `n_unknown` of `n` patients with pneumonia are single images."""
    if not n_unknown:
        return ''
    if n_unknown == n:
        return ' Their patients are unknown; if several images are of one patient, this promises too much.'
    return (
        f' {n_unknown:,} of these patients are single images whose patient is unknown; if several of them are of one '
        'patient, this promises too much.'
    )


def youden(sample: Sample) -> tuple[float, str]:
    """Choose the threshold with the greatest sensitivity + specificity (Youden 1950); the lowest of equal ones."""
    positives = sample.targs.sum()
    negatives = (~sample.targs).sum()
    cuts, missed, alarms = _errors_by_cut(sample)
    return _below(cuts[np.argmin(missed / positives + alarms / negatives)], sample.p), ''


def least_cost(sample: Sample, missed_cost: float, alarm_cost: float) -> tuple[float, str]:
    """Choose the threshold with the least cost at the prevalence of these images; the lowest of equal ones."""
    cuts, missed, alarms = _errors_by_cut(sample)
    threshold = _below(cuts[np.argmin(missed_cost * missed + alarm_cost * alarms)], sample.p)
    return threshold, f'The cost is least at the prevalence of the validation images, {sample.targs.mean():.2f}.'


def _errors_by_cut(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all thresholds that differ, and the numbers of missed pneumonias and of false alarms at each."""
    targs, p = sample.targs, sample.p
    cuts = np.append(np.unique(p), np.inf)
    missed = np.searchsorted(np.sort(p[targs]), cuts)
    alarms = (~targs).sum() - np.searchsorted(np.sort(p[~targs]), cuts)
    return cuts, missed, alarms


def _below(score: float, p: np.ndarray) -> float:
    """Return a short number between `score` and the next lower score in `p`.

    It classifies the same images as positive as `score` itself, even where the last digits of a prediction differ.
    """
    lower_scores = p[p < score]
    low = float(lower_scores.max()) if len(lower_scores) else 0.0
    high = float(min(score, np.nextafter(1, 2)))
    for decimals in range(MIN_DECIMALS, MAX_DECIMALS + 1):
        threshold = round((low + high) / 2, decimals)
        if low < threshold <= high:
            return threshold
    return high


@dataclass(frozen=True)
class Rule:
    """A rule that chooses a threshold from a sample of images, and the numbers that it takes."""

    choose: Callable[..., tuple[float, str]]
    form: str
    """The numbers as they are written after the name of the rule, separated by `/`."""
    requirement: str
    """The numbers in words."""
    allows: Callable[..., bool]

    def n_numbers(self) -> int:
        """Return how many numbers the rule takes."""
        return len(self.form.split('/')) if self.form else 0


def _is_probability(threshold: float) -> bool:
    return 0 <= threshold <= 1


def _is_sensitivity(target: float) -> bool:
    return 0 < target < 1


def _has_no_numbers() -> bool:
    return True


def _are_costs(missed_cost: float, alarm_cost: float) -> bool:
    return 0 < missed_cost < math.inf and 0 < alarm_cost < math.inf


RULES = {
    'fixed': Rule(fixed, 'T', 'a number from 0 to 1', _is_probability),
    'sensitivity': Rule(keep_sensitivity, 'S', 'a number above 0 and below 1', _is_sensitivity),
    'youden': Rule(youden, '', 'no number', _has_no_numbers),
    'cost': Rule(least_cost, 'FN/FP', 'two positive numbers', _are_costs),
}


ON_SHIFT = f'@{SHIFT}'
"""Ending of a rule whose threshold is chosen on the split `shift`, such as `sensitivity:0.95@shift`."""


def deciding_split(rule: str) -> str:
    """Return the split that the threshold of `rule` is chosen on: `valid`, or `shift` if the rule ends in `@shift`."""
    return SHIFT if rule.endswith(ON_SHIFT) else 'valid'


def describe_deciding(rule: str) -> str:
    """Return the images that the threshold of `rule` was chosen on, in words."""
    return 'soft images (the split shift)' if deciding_split(rule) == SHIFT else 'validation images'


def parse_rule(rule: str) -> tuple[Callable[..., tuple[float, str]], tuple[float, ...]]:
    """Return the function and the numbers of a rule such as `cost:10/1`. Raises `UsageError` for an invalid one."""
    name, _, text = rule.removesuffix(ON_SHIFT).partition(':')
    if name not in RULES:
        raise UsageError(
            f'--threshold {rule}: unknown rule. Choose one of {", ".join(map(_spell, RULES))}{_suggest_fixed(rule)}.'
        )
    try:
        numbers = tuple(float(number) for number in text.split('/')) if text else ()
    except ValueError:
        numbers = (math.nan,)
    if name == 'fixed' and deciding_split(rule) == SHIFT:
        raise UsageError(f'--threshold {rule}: a fixed threshold is not chosen on images. Omit {ON_SHIFT}.')
    if len(numbers) != RULES[name].n_numbers() or not RULES[name].allows(*numbers):
        raise UsageError(f'--threshold {rule}: {name} requires {RULES[name].requirement}. Write {_spell(name)}.')
    return RULES[name].choose, numbers


def _suggest_fixed(rule: str) -> str:
    """Return how to write `rule` as a fixed threshold if it is a number or a percentage; otherwise nothing."""
    try:
        share = float(rule.removesuffix('%')) / (100 if rule.endswith('%') else 1)
    except ValueError:
        return ''
    return f'; for a fixed threshold, write fixed:{share:g}'


def _spell(name: str) -> str:
    form = RULES[name].form
    return f'{name}:{form}' if form else name


TABLE_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Thresholds of `threshold_table`."""
BAND_DRAWS = 500
BAND_GRID = np.linspace(0, 1, 201)
"""Horizontal positions at which a band is computed."""


def roc_curve(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates from (0, 0) to (1, 1)."""
    from sklearn import metrics

    fpr, tpr, _ = metrics.roc_curve(*targets_and_probabilities(predictions))
    return fpr, tpr


def precision_recall_curve(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return recall (sensitivity) and precision (PPV), from the highest threshold to the lowest."""
    from sklearn import metrics

    precision, recall, _ = metrics.precision_recall_curve(*targets_and_probabilities(predictions))
    return recall[::-1], precision[::-1]


def roc_band(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compute the pointwise 95% band of the ROC curve over the bootstrap of patients.

    Returns:
        Columns `x` (false positive rate), `low` and `high` (true positive rate).
    """
    tp, fp = _bootstrap_counts(predictions)
    return _band(fp / np.maximum(fp[:, -1:], 1), tp / np.maximum(tp[:, -1:], 1))


def precision_recall_band(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compute the pointwise 95% band of the precision-recall curve over the bootstrap of patients.

    Returns:
        Columns `x` (recall), `low` and `high` (precision).
    """
    tp, fp = _bootstrap_counts(predictions)
    predicted = tp + fp
    precision = np.where(predicted > 0, tp / np.maximum(predicted, 1), 1)  # 1 without positives, as in scikit-learn
    return _band(tp / np.maximum(tp[:, -1:], 1), precision)


def _bootstrap_counts(predictions: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    sample = Sample.from_predictions(predictions)
    return roc_draws(draw_patients(sample.patients, BAND_DRAWS), sample.targs, sample.p)


def _band(x: np.ndarray, y: np.ndarray) -> pd.DataFrame:
    """Return the middle 95% of the curves `y` over `x`, both (draws, points)."""
    curves = np.stack([np.interp(BAND_GRID, x_of_draw, y_of_draw) for x_of_draw, y_of_draw in zip(x, y, strict=True)])
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    return pd.DataFrame({'x': BAND_GRID, 'low': low, 'high': high})


def threshold_table(predictions: pd.DataFrame, marked: Sequence[float] = (), prevalence: float = 0.1) -> pd.DataFrame:
    """Compute the metrics at each of `TABLE_THRESHOLDS` and at each `marked` threshold.

    Returns:
        Columns `threshold`, `sensitivity`, `specificity`, `missed` and `alarms` (counts of false negatives and false
        positives), and `ppv` and `npv` at `prevalence`. Each metric is an `Estimate`.
    """
    sample = Sample.from_predictions(predictions)
    rows = []
    for threshold in sorted({*TABLE_THRESHOLDS, *marked}):
        confusion = ConfusionMatrix(sample, threshold)
        values = at_prevalence(confusion, prevalence)
        row = {
            'threshold': threshold,
            'sensitivity': confusion.rate('sensitivity'),
            'specificity': confusion.rate('specificity'),
            'missed': confusion.counts['fn'],
            'alarms': confusion.counts['fp'],
            'ppv': values['ppv'],
            'npv': values['npv'],
        }
        rows.append(row)
    return pd.DataFrame(rows)


def net_benefit(predictions: pd.DataFrame, thresholds: np.ndarray) -> pd.DataFrame:
    """Compute the net benefit at each threshold probability (decision curve analysis; Vickers and Elkin 2006).

    It is measured in true positives per image, where a false alarm costs the odds of the threshold probability.

    Returns:
        Columns `threshold`, `model`, and `all` for treating every patient.
    """
    targs, p = targets_and_probabilities(predictions)
    positive = p >= thresholds[:, None]
    odds = thresholds / (1 - thresholds)
    model = (positive & targs).mean(axis=1) - (positive & ~targs).mean(axis=1) * odds
    treat_all = targs.mean() - (1 - targs.mean()) * odds
    return pd.DataFrame({'threshold': thresholds, 'model': model, 'all': treat_all})


def risk_coverage(predictions: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Compute the accuracy where the least certain images are left to a human (El-Yaniv and Wiener 2010).

    Certainty is the distance from `threshold` on the logit scale.

    Returns:
        Columns `coverage` (share of images classified by the model) and `accuracy` on them.
    """
    targs, p = targets_and_probabilities(predictions)
    distance = np.abs(logits(p) - logits(threshold))
    most_certain_first = np.argsort(-distance, kind='stable')
    correct = ((p >= threshold) == targs)[most_certain_first]
    n_classified = np.arange(1, len(p) + 1)
    return pd.DataFrame({'coverage': n_classified / len(p), 'accuracy': np.cumsum(correct) / n_classified})
