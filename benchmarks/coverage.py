"""How often the 95 % intervals of `evaluate` hold the truth, on simulated images whose truth is known.

    python benchmarks/coverage.py --trials 500

Each patient has one image, or several as in the public set (1 to 30, most have one); the images of a patient share half
of what makes their scores vary. Rows are the interval that is reported, and others that could have been: images taken as
independent, and the plain percentiles of the bootstrap of patients. Prints a Markdown table of coverage and mean width.
"""

import argparse
import sys
from collections.abc import Iterator

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

SHARED = 0.5
"""The share of a score's variance that belongs to the patient."""
PREVALENCE = 0.1
SETTINGS = {  # patients of each class, whether they have several images, and the distance of the classes
    'one image a patient, AUC .983': (234, 390, False, 3.0),
    'one image a patient, AUC .998': (234, 390, False, 4.0),
    'one image a patient, few, AUC .983': (40, 40, False, 3.0),
    'several images, AUC .983': (150, 210, True, 3.0),
    'several images, AUC .998': (150, 210, True, 4.0),
    'several images, few, AUC .983': (40, 40, True, 3.0),
}
SENSITIVITY = 0.95
"""The truth at the threshold; the specificity follows from the distance."""


def draw(normals: int, pneumonias: int, several: bool, distance: float, rng: np.random.Generator) -> Sample:
    """Simulated images: scores are probabilities in order only."""
    people = normals + pneumonias
    images = np.minimum(rng.geometric(0.55, people), 30) if several else np.ones(people, int)
    patients = np.repeat(np.arange(people), images)
    targs = patients >= normals
    shared = rng.normal(0, np.sqrt(SHARED), people)[patients]
    scores = shared + rng.normal(0, np.sqrt(1 - SHARED), len(patients)) + distance * targs
    return Sample(targs, norm.cdf(scores - distance / 2), patients.astype(str))


def intervals(sample: Sample, threshold: float) -> Iterator[tuple[str, str, Estimate]]:
    """Figure, way and estimate."""
    confusion = ConfusionMatrix(sample, threshold)
    positives = confusion.counts['tp'] + confusion.counts['fn']
    yield 'sensitivity', 'reported', confusion.rate('sensitivity')
    yield 'sensitivity', 'images independent (Wilson)', wilson_interval(confusion.counts['tp'], positives)
    yield 'sensitivity', 'percentiles', make_estimate(0, *percentile_interval(confusion.rate_draws('sensitivity')))
    auc_of_draws = auc_draws(sample.weights, sample.targs, sample.p)
    yield 'AUC', 'reported', measure_auc(sample)
    yield 'AUC', 'images independent (DeLong, logit)', auc_interval(sample.targs, sample.p)
    yield 'AUC', 'percentiles', make_estimate(0, *percentile_interval(auc_of_draws))
    names = ('sensitivity', 'specificity')
    rates = [confusion.rate(name) for name in names]
    sizes = [confusion.effective_size(*RATES[name]) for name in names]
    yield 'PPV at 10%', 'reported', predictive_values(*rates, *sizes, PREVALENCE)[0]


def truths(distance: float) -> tuple[float, dict[str, float]]:
    """The threshold of the true sensitivity `SENSITIVITY`, and what is true there."""
    cut = distance - norm.ppf(SENSITIVITY)
    a, b = SENSITIVITY * PREVALENCE, norm.sf(cut) * (1 - PREVALENCE)
    return float(norm.cdf(cut - distance / 2)), {
        'sensitivity': SENSITIVITY,
        'AUC': norm.cdf(distance / np.sqrt(2)),
        'PPV at 10%': a / (a + b),
    }


def main() -> None:
    """Simulate every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    print('| images | figure | interval | coverage | mean width |\n|---|---|---|---|---|')
    for name, (*sizes, distance) in SETTINGS.items():
        rng, (threshold, truth) = np.random.default_rng(args.seed), truths(distance)
        found: dict[tuple[str, str], list[tuple[bool, float]]] = {}
        for trial in range(args.trials):
            if sys.stderr.isatty():
                print(f'\r{name}: {trial}', end='', file=sys.stderr)
            for figure, way, e in intervals(draw(*sizes, distance, rng), threshold):
                held = e['low'] <= truth[figure] <= e['high']
                found.setdefault((figure, way), []).append((held, e['high'] - e['low']))
        for (figure, way), trials in found.items():
            held, width = np.mean(trials, axis=0)
            print(f'| {name} | {figure} | {way} | {held:.3f} | {width:.4f} |', flush=True)


if __name__ == '__main__':
    main()
