"""Measure a run on the soft images that its training held out, beside its ordinary validation images.

`data.shift` says which images these are and why. The threshold and the temperature come from the validation images, as
for any other split: what they are worth on images that differ from those of the training is what this shows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.intervals import Estimate, make_estimate
from cxr_fastai.evaluation.metrics import ConfusionMatrix, Sample
from cxr_fastai.evaluation.split_images import NO_IMAGES
from cxr_fastai.evaluation.thresholds import ON_SHIFT, parse_rule

SENSITIVITY = 0.95
"""The sensitivity at which specificities are compared."""
COMPARED_SPLITS = ('valid', SHIFT)
SHIFT_NAMES = {
    'n': 'images',
    'auc': 'AUC',
    'specificity_at_95': 'specificity at sensitivity 0.95',
    'sensitivity': 'sensitivity at the threshold',
    'specificity': 'specificity at the threshold',
    'intercept': 'calibration intercept',
    'slope': 'calibration slope',
}
"""Key of a figure of `measure_shift` to its name."""


def evaluate_shift(
    run: Run | StrPath,
    data: StrPath | None = None,
    batch_size: int = 32,
    rule: str | None = None,
    again: bool = True,
    device: str = 'auto',
) -> dict[str, Any]:
    """Evaluate a run on the splits `shift` and `valid`, and return the results of `measure_shift`.

    The arguments are those of `evaluate`. Raises `UsageError` if the training held out no images.
    """
    run = as_run(run)
    if not (run.items.split == SHIFT).any():
        raise UsageError(f'{run.path}: the run has no images of the split {SHIFT}. {NO_IMAGES[SHIFT]}')
    evaluate(run, data, SHIFT, batch_size, rule=rule, again=again, device=device)
    evaluate(run, data, 'valid', batch_size, again=False, device=device)
    return measure_shift(run)


def measure_shift(run: Run) -> dict[str, Any]:
    """Return the figures of a run that was evaluated on the splits `valid` and `shift`.

    Returns:
        `splits`: for each of the two splits `n`; `auc`; `specificity_at_95`, the specificity at a sensitivity of 0.95
        on the same images, for which no threshold has to be chosen; `sensitivity` and `specificity` at the threshold of
        the run; and `intercept` and `slope` of the calibration, where an intercept below 0 says that the probabilities
        are too high.
        `thresholds`: for each split that the rule of the run can be followed on, the `threshold` and the sensitivity
        and specificity that it has on both splits.

    Raises `UsageError` if a split was not evaluated.
    """
    metrics = run.metrics
    samples = {split: Sample.from_predictions(run.predicted(split)) for split in COMPARED_SPLITS if split in metrics}
    missing = [split for split in COMPARED_SPLITS if split not in samples]
    if missing:
        raise UsageError(f'{run.path}: not evaluated on {" and ".join(missing)}. Run `cxr-fastai evaluate --shift`.')
    splits = {split: _describe(sample, metrics[split]) for split, sample in samples.items()}
    rule = metrics[SHIFT]['threshold_rule'].removesuffix(ON_SHIFT)
    decidable = [split for split, sample in samples.items() if sample.targs.any() and not sample.targs.all()]
    thresholds = {split: _compare_threshold(samples[split], rule, samples) for split in decidable}
    return {'rule': rule, 'splits': splits, 'thresholds': thresholds}


def has_shift(run: Run) -> bool:
    """Return whether `run` was evaluated on both splits."""
    return set(COMPARED_SPLITS) <= run.metrics.keys()


def _describe(sample: Sample, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        'n': len(sample.p),
        'auc': metrics['auc'],
        'specificity_at_95': specificity_at(sample, SENSITIVITY),
        'sensitivity': metrics['sensitivity'],
        'specificity': metrics['specificity'],
        'intercept': metrics['calibration']['intercept'],
        'slope': metrics['calibration']['slope'],
    }


def _compare_threshold(deciding: Sample, rule: str, samples: dict[str, Sample]) -> dict[str, Any]:
    """Return the threshold that `rule` chooses on the images `deciding`, and its rates on each of the `samples`."""
    choose, numbers = parse_rule(rule)
    threshold, _ = choose(deciding, *numbers)
    row: dict[str, Any] = {'threshold': threshold}
    for name, sample in samples.items():
        confusion = ConfusionMatrix(sample, threshold)
        row[name] = {rate: confusion.rate(rate) for rate in ('sensitivity', 'specificity')}
    return row


def specificity_at(sample: Sample, sensitivity: float) -> Estimate:
    """Return the specificity at the highest threshold with at least this `sensitivity` on the images of `sample`.

    The interval is that of the specificity at this threshold. Undefined if a class is missing.
    """
    scores = np.sort(sample.p[sample.targs])[::-1]
    if not len(scores) or len(scores) == len(sample.p):
        return make_estimate(None)
    needed = max(1, math.ceil(sensitivity * len(scores) - 1e-9))
    return ConfusionMatrix(sample, float(scores[needed - 1])).rate('specificity')


def shift_table(results: dict[str, Any]) -> pd.DataFrame:
    """Return the values of the `splits` that `measure_shift` returned, with a row for each split."""
    rows = []
    for split, figures in results['splits'].items():
        values = {name: value['value'] if isinstance(value, dict) else value for name, value in figures.items()}
        rows.append({'split': split, **values})
    return pd.DataFrame(rows)
