"""Measure how often the 95% intervals of `evaluate` contain the true value, on simulated images.

    python benchmarks/coverage.py --trials 500

Each patient has one image, or several as in the public data set (1 to 30; most have one). The images of a patient
share half of the variance of their scores. The rows compare the reported interval with alternatives: intervals for
independent images, and the percentiles of the bootstrap of patients. Prints a Markdown table of coverage and mean
width.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from cxr_fastai.evaluation.intervals import (
    Estimate,
    auc_draws,
    auc_interval,
    make_estimate,
    percentile_interval,
    predictive_values,
    wilson_interval,
)
from cxr_fastai.evaluation.metrics import RATES, ConfusionMatrix, Sample, measure_auc

SHARED_VARIANCE = 0.5
"""Proportion of the variance of a score that the images of a patient share."""
PREVALENCE = 0.1
SENSITIVITY = 0.95
"""True sensitivity at the threshold; the specificity follows from the distance between the classes."""


class Setting(NamedTuple):
    """Numbers of patients, whether they have several images, and the distance of the mean scores of the classes."""

    normals: int
    pneumonias: int
    several_images: bool
    distance: float


SETTINGS = {
    'one image per patient, AUC 0.983': Setting(234, 390, False, 3.0),
    'one image per patient, AUC 0.998': Setting(234, 390, False, 4.0),
    'one image per patient, few patients, AUC 0.983': Setting(40, 40, False, 3.0),
    'several images, AUC 0.983': Setting(150, 210, True, 3.0),
    'several images, AUC 0.998': Setting(150, 210, True, 4.0),
    'several images, few patients, AUC 0.983': Setting(40, 40, True, 3.0),
}


def simulate(setting: Setting, rng: np.random.Generator) -> Sample:
    """Return simulated images. Their probabilities are ranked correctly, but not calibrated."""
    n_patients = setting.normals + setting.pneumonias
    if setting.several_images:
        images_per_patient = np.minimum(rng.geometric(0.55, n_patients), 30)
    else:
        images_per_patient = np.ones(n_patients, int)
    patients = np.repeat(np.arange(n_patients), images_per_patient)
    targs = patients >= setting.normals
    patient_part = rng.normal(0, np.sqrt(SHARED_VARIANCE), n_patients)[patients]
    image_part = rng.normal(0, np.sqrt(1 - SHARED_VARIANCE), len(patients))
    scores = patient_part + image_part + setting.distance * targs
    return Sample(targs, norm.cdf(scores - setting.distance / 2), patients.astype(str))


def estimate_intervals(sample: Sample, threshold: float) -> Iterator[tuple[str, str, Estimate]]:
    """Yield metric, kind of interval and estimate."""
    confusion = ConfusionMatrix(sample, threshold)
    positives = confusion.counts['tp'] + confusion.counts['fn']
    yield 'sensitivity', 'reported', confusion.rate('sensitivity')
    yield 'sensitivity', 'independent images (Wilson)', wilson_interval(confusion.counts['tp'], positives)
    yield 'sensitivity', 'percentiles', make_estimate(0, *percentile_interval(confusion.rate_draws('sensitivity')))
    yield 'AUC', 'reported', measure_auc(sample)
    yield 'AUC', 'independent images (DeLong, logit)', auc_interval(sample.targs, sample.p)
    draws = auc_draws(sample.weights, sample.targs, sample.p)
    yield 'AUC', 'percentiles', make_estimate(0, *percentile_interval(draws))
    ppv, _ = predictive_values(
        confusion.rate('sensitivity'),
        confusion.rate('specificity'),
        confusion.effective_size(*RATES['sensitivity']),
        confusion.effective_size(*RATES['specificity']),
        PREVALENCE,
    )
    yield 'PPV at 10%', 'reported', ppv


def true_values(distance: float) -> tuple[float, dict[str, float]]:
    """Return the threshold with the true sensitivity `SENSITIVITY`, and the true values of the metrics there."""
    cut = distance - norm.ppf(SENSITIVITY)
    true_positives = SENSITIVITY * PREVALENCE
    false_positives = norm.sf(cut) * (1 - PREVALENCE)
    metrics = {
        'sensitivity': SENSITIVITY,
        'AUC': norm.cdf(distance / np.sqrt(2)),
        'PPV at 10%': true_positives / (true_positives + false_positives),
    }
    return float(norm.cdf(cut - distance / 2)), metrics


def measure_coverage(name: str, setting: Setting, trials: int, seed: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Return coverage and mean width by metric and kind of interval."""
    rng = np.random.default_rng(seed)
    threshold, truth = true_values(setting.distance)
    results: defaultdict[tuple[str, str], list[tuple[bool, float]]] = defaultdict(list)
    for trial in range(trials):
        if sys.stderr.isatty():
            print(f'\r{name}: {trial}', end='', file=sys.stderr)
        for metric, kind, estimate in estimate_intervals(simulate(setting, rng), threshold):
            low, high = estimate['low'], estimate['high']
            results[metric, kind].append((low <= truth[metric] <= high, high - low))
    return {key: tuple(np.mean(values, axis=0)) for key, values in results.items()}


def main() -> None:
    """Simulate every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    print('| images | metric | interval | coverage | mean width |\n|---|---|---|---|---|')
    for name, setting in SETTINGS.items():
        results = measure_coverage(name, setting, args.trials, args.seed)
        for (metric, kind), (coverage, width) in results.items():
            print(f'| {name} | {metric} | {kind} | {coverage:.3f} | {width:.4f} |', flush=True)


if __name__ == '__main__':
    main()
