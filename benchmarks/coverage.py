"""Measure on simulated images how often the 95% intervals of `evaluate` contain the true value, and whether the
threshold keeps its promise.

    python benchmarks/coverage.py intervals --trials 400
    python benchmarks/coverage.py few --trials 1000
    python benchmarks/coverage.py threshold --trials 1000

`intervals`: each patient has one image, or several as in the public data set (1 to 30; most have one). `few`: few
patients with ten images each. `threshold`: the sensitivity on the images of new patients at the threshold of
`sensitivity:0.95`. Prints Markdown tables; the intervals are compared with those for independent images, and with the
percentiles of the bootstrap of patients.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from cxr_fastai.evaluation.intervals import Estimate, auc_draws, auc_interval, make_estimate, wilson_interval
from cxr_fastai.evaluation.metrics import (
    ConfusionMatrix,
    Sample,
    at_prevalence,
    measure_auc,
    measure_average_precision,
)
from cxr_fastai.evaluation.thresholds import keep_sensitivity

PREVALENCE = 0.1
SENSITIVITY = 0.95
"""True sensitivity at the threshold; the specificity follows from the distance between the classes."""
N_TRUE = 400_000
"""Images of a large sample that gives the true value of metrics without a formula."""


class Setting(NamedTuple):
    """How images are simulated.

    `images` is the number of images of each patient, None for 1 to 30. The images of a patient share the proportion
    `shared` of the variance of their scores, and `distance` is that of the mean scores of the classes.
    """

    normals: int
    pneumonias: int
    images: int | None
    distance: float
    shared: float = 0.5


SETTINGS = {
    'one image per patient, AUC 0.983': Setting(234, 390, 1, 3.0),
    'one image per patient, AUC 0.998': Setting(234, 390, 1, 4.0),
    'one image per patient, few patients, AUC 0.983': Setting(40, 40, 1, 3.0),
    'several images, AUC 0.983': Setting(150, 210, None, 3.0),
    'several images, AUC 0.998': Setting(150, 210, None, 4.0),
    'several images, few patients, AUC 0.983': Setting(40, 40, None, 3.0),
}
FEW_PATIENTS = (2, 3, 5, 10, 20)
"""Patients of each class, with ten images each."""
SHARED_VARIANCES = (0.2, 0.5, 0.8)
DISTANCES = (2.0, 3.0)
THRESHOLD_SETTINGS = {
    '10 patients, 20 images each': np.full(10, 20),
    '10 patients, one with half of 200 images': np.array([100, *[11] * 8, 12]),
    '40 patients, 5 images each': np.full(40, 5),
    '40 patients, one with half of 200 images': np.array([100, *[2] * 17, *[3] * 22]),
    '200 patients, 1 to 30 images': np.minimum(np.random.default_rng(0).geometric(0.55, 200), 30),
}
"""Numbers of pneumonia images of each validation patient."""
TARGET = 0.95


def simulate(setting: Setting, rng: np.random.Generator) -> Sample:
    """Return simulated images. Their probabilities are ranked correctly, but not calibrated."""
    n_patients = setting.normals + setting.pneumonias
    if setting.images is None:
        images_per_patient = np.minimum(rng.geometric(0.55, n_patients), 30)
    else:
        images_per_patient = np.full(n_patients, setting.images)
    patients = np.repeat(np.arange(n_patients), images_per_patient)
    targs = patients >= setting.normals
    scores = draw_scores(patients, setting.shared, rng) + setting.distance * targs
    return Sample(targs, norm.cdf(scores - setting.distance / 2), patients.astype(str))


def draw_scores(patients: np.ndarray, shared: float, rng: np.random.Generator) -> np.ndarray:
    """Return scores (n,) of variance 1; the images of each of `patients` (n,) share the proportion `shared` of it."""
    patient_part = rng.normal(0, np.sqrt(shared), patients.max() + 1)[patients]
    image_part = rng.normal(0, np.sqrt(1 - shared), len(patients))
    scores: np.ndarray = patient_part + image_part
    return scores


def reported_intervals(sample: Sample, threshold: float) -> dict[str, Estimate]:
    """Return the intervals that `evaluate` reports, by metric."""
    confusion = ConfusionMatrix(sample, threshold)
    return {
        'AUC': measure_auc(sample),
        'average precision': measure_average_precision(sample),
        'sensitivity': confusion.rate('sensitivity'),
        'balanced accuracy': confusion.balanced_accuracy(),
        'PPV at 10%': at_prevalence(confusion, PREVALENCE)['ppv'],
    }


def estimate_intervals(sample: Sample, threshold: float) -> Iterator[tuple[str, str, Estimate]]:
    """Yield metric, kind of interval and estimate."""
    reported = reported_intervals(sample, threshold)
    confusion = ConfusionMatrix(sample, threshold)
    positives = confusion.counts['tp'] + confusion.counts['fn']
    yield 'sensitivity', 'reported', reported['sensitivity']
    yield 'sensitivity', 'independent images (Wilson)', wilson_interval(confusion.counts['tp'], positives)
    yield 'sensitivity', 'percentiles', percentiles(confusion.rate_draws('sensitivity'))
    yield 'AUC', 'reported', reported['AUC']
    yield 'AUC', 'independent images (DeLong, logit)', auc_interval(sample.targs, sample.p)
    yield 'AUC', 'percentiles', percentiles(auc_draws(sample.weights, sample.targs, sample.p))
    yield 'PPV at 10%', 'reported', reported['PPV at 10%']


def percentiles(draws: np.ndarray) -> Estimate:
    """Return the interval from the 2.5th to the 97.5th percentile of the draws."""
    return make_estimate(0, *np.nanpercentile(draws, [2.5, 97.5]))


def true_values(setting: Setting) -> tuple[float, dict[str, float]]:
    """Return the threshold with the true sensitivity `SENSITIVITY`, and the true values of the metrics there."""
    cut = setting.distance - norm.ppf(SENSITIVITY)
    specificity = norm.cdf(cut)
    true_positives = SENSITIVITY * PREVALENCE
    false_positives = (1 - specificity) * (1 - PREVALENCE)
    share = setting.pneumonias / (setting.normals + setting.pneumonias)
    metrics = {
        'AUC': norm.cdf(setting.distance / np.sqrt(2)),
        'average precision': true_average_precision(setting.distance, share),
        'sensitivity': SENSITIVITY,
        'balanced accuracy': (SENSITIVITY + specificity) / 2,
        'PPV at 10%': true_positives / (true_positives + false_positives),
    }
    return float(norm.cdf(cut - setting.distance / 2)), metrics


def true_average_precision(distance: float, share: float) -> float:
    """Return the area under the precision-recall curve where the `share` of the images is positive."""
    cuts = np.linspace(distance + 8, -8, N_TRUE)
    recall = norm.sf(cuts - distance)
    precision = share * recall / (share * recall + (1 - share) * norm.sf(cuts))
    return float(np.trapezoid(precision, recall))


def print_intervals(trials: int, seed: int) -> None:
    """Print coverage and mean width of the intervals in `SETTINGS`."""
    print('| images | metric | interval | coverage | mean width |\n|---|---|---|---|---|')
    for name, setting in SETTINGS.items():
        rng = np.random.default_rng(seed)
        threshold, truth = true_values(setting)
        results = defaultdict(list)
        for trial in range(trials):
            show_progress(f'{name}: {trial}')
            for metric, kind, estimate in estimate_intervals(simulate(setting, rng), threshold):
                results[metric, kind].append(assess(estimate, truth[metric]))
        for (metric, kind), values in results.items():
            coverage, width = np.nanmean(values, axis=0)
            print(f'| {name} | {metric} | {kind} | {coverage:.3f} | {width:.4f} |', flush=True)


def print_few(trials: int, seed: int) -> None:
    """Print the coverage of the intervals with few patients of each class, and of those for independent images."""
    metrics = list(true_values(Setting(1, 1, 10, 2.0))[1])
    print(f'| AUC | patients of each class | shared variance | {" | ".join(metrics)} | AUC, images independent |')
    print('|---' * (len(metrics) + 4) + '|')
    for distance in DISTANCES:
        for n_patients in FEW_PATIENTS:
            for shared in SHARED_VARIANCES:
                setting = Setting(n_patients, n_patients, 10, distance, shared)
                coverages = ' | '.join(f'{coverage:.3f}' for coverage in measure_few(setting, trials, seed))
                auc = norm.cdf(distance / np.sqrt(2))
                print(f'| {auc:.3f} | {n_patients} | {shared} | {coverages} |', flush=True)


def measure_few(setting: Setting, trials: int, seed: int) -> list[float]:
    """Return the coverages of a row of the table of `print_few`."""
    rng = np.random.default_rng(seed)
    threshold, truth = true_values(setting)
    rows = []
    for trial in range(trials):
        show_progress(f'{setting}: {trial}')
        sample = simulate(setting, rng)
        reported = reported_intervals(sample, threshold)
        covered = [assess(estimate, truth[metric])[0] for metric, estimate in reported.items()]
        rows.append([*covered, assess(auc_interval(sample.targs, sample.p), truth['AUC'])[0]])
    return [float(coverage) for coverage in np.nanmean(rows, axis=0)]


def assess(estimate: Estimate, truth: float) -> tuple[float, float]:
    """Return 1 if the interval contains the true value, else 0, and its width; NaN without an interval."""
    low, high = estimate['low'], estimate['high']
    if low is None or high is None:
        return np.nan, np.nan
    return float(low <= truth <= high), high - low


def print_threshold(trials: int, seed: int) -> None:
    """Print the mean sensitivity on images of new patients, where the rule counts images and where it counts patients.

    The shared variance is 0.5. New patients have as many images as those of the validation, drawn at random.
    """
    print(f'| validation patients with pneumonia | images count | patients count | trials above {TARGET} | warning |')
    print('|---|---|---|---|---|')
    for name, images_per_patient in THRESHOLD_SETTINGS.items():
        rng = np.random.default_rng(seed)
        patients = np.repeat(np.arange(len(images_per_patient)), images_per_patient)
        by_image, by_patient, warnings = [], [], []
        for trial in range(trials):
            show_progress(f'{name}: {trial}')
            scores = draw_scores(patients, 0.5, rng)
            targs = np.ones(len(scores), bool)
            for groups, sensitivities in ((np.arange(len(scores)), by_image), (patients, by_patient)):
                threshold, margin = keep_sensitivity(Sample(targs, norm.cdf(scores), groups.astype(str)), TARGET)
                sensitivities.append(norm.sf(norm.ppf(threshold)))
            warnings.append(margin.startswith('Warning'))
        above = np.mean(np.array(by_patient) >= TARGET)
        print(
            f'| {name} | {np.mean(by_image):.3f} | {np.mean(by_patient):.3f} | {above:.2f} | '
            f'{"yes" if np.mean(warnings) > 0.5 else "no"} |',
            flush=True,
        )


def show_progress(text: str) -> None:
    """Show `text` on a terminal."""
    if sys.stderr.isatty():
        print(f'\r{text}', end='', file=sys.stderr)


TABLES = {'intervals': print_intervals, 'few': print_few, 'threshold': print_threshold}


def main() -> None:
    """Print one of `TABLES`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=TABLES)
    parser.add_argument('--trials', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    TABLES[args.table](args.trials, args.seed)


if __name__ == '__main__':
    main()
