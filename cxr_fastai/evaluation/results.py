"""What the results of a run are worth: `check_results` refuses those that do not belong together, before anything is
published from them, and `describe_limits` says what limits them."""

from __future__ import annotations

from typing import Any

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import ESTIMATE, MISMATCHES
from cxr_fastai.core.schemas import Fields, Flag, Integer, ListOf, Number, Table, Text, check_object
from cxr_fastai.evaluation.metrics import RANKING_METRICS, THRESHOLD_METRICS, ConfusionMatrix, Sample, is_complete
from cxr_fastai.inference.config import find_network, identify_network
from cxr_fastai.inference.decision import Decision

OPTIMISTIC = {
    'valid': 'These images were also used to select the epoch and the threshold, so all metrics are optimistic.',
    'train': 'The network was trained on these images, so all metrics are optimistic.',
    SHIFT: (
        'These images were held out of training: the softest normal ones, and random ones of pneumonia. They imitate '
        'images of other days; the metrics are not those of a random sample.'
    ),
}
"""What limits the metrics of a split that is not the test split."""
OF_OTHER_NETWORKS = (
    'The network of this run was trained on all of these images; maps show this network. The predictions are those '
    'of {n} other networks, trained in the same way, each for the images of patients that it was not trained on. They '
    'were also used to choose the threshold.'
)
"""What limits the metrics of out-of-fold predictions."""
VIEWS = (
    'Each probability is the mean over an image and its mirror image (test-time views), also those that the threshold '
    'and the temperature were chosen on. Prediction with this model averages in the same way.'
)
"""What metrics with test-time views are of."""
TOLERANCE = 1e-6
"""Largest difference of a metric that is computed again."""
METRICS = {
    'n': Integer(1),
    'positives': Integer(0),
    'unknown_patients': Integer(0),
    'threshold': Number(0, 2),
    'patients_by_class': Table(Integer(0)),
    'intervals': Fields({'grouped_by_patient': Flag()}),
    'subgroups': ListOf(Fields({'column': Text(200)})),
    'prevalences': ListOf(Fields({'prevalence': Number(0, 1), 'ppv': ESTIMATE, 'npv': ESTIMATE})),
    'confusion': Fields(dict.fromkeys(('tn', 'fp', 'fn', 'tp'), Integer(0))),
} | dict.fromkeys((*RANKING_METRICS, *THRESHOLD_METRICS), ESTIMATE)
"""The fields of the metrics of a split that reports read."""


def describe_limits(split: str, metrics: dict[str, Any]) -> str:
    """Return what limits the `metrics` of a split; empty for the test split."""
    if metrics.get('out_of_fold'):
        return OF_OTHER_NETWORKS.format(n=metrics['out_of_fold'])
    return OPTIMISTIC.get(split, '')


def describe_views(metrics: dict[str, Any]) -> str:
    """Return `VIEWS` if the `metrics` of a split were computed with test-time views, else nothing."""
    return VIEWS if metrics.get('tta') else ''


def check_results(run: Run, split: str) -> dict[str, Any]:
    """Return the metrics of `split`, which belong to the predictions, the decision and the network in `run`.

    The hashes in `metrics.json` are compared, and sensitivity, specificity and AUC are computed again from the
    predictions. Raises `UsageError`, which says what does not fit and advises to evaluate again.
    """
    metrics = run.metrics[split]
    predictions = run.predicted(split)
    decision = Decision.from_run(run, metrics.get('model', ''))
    if not is_complete(metrics):
        problem = 'were made by an older version'
    elif metrics.get('n') != len(predictions):
        problem = f'are of {counted(metrics.get("n", 0))}, but predictions.csv contains {len(predictions)}'
    elif not is_of_network(run, metrics):
        problem = 'are of another network'
    elif decision is None or not decision.matches(metrics):
        problem = MISMATCHES['decision']
    else:
        problem = _compare(metrics, Sample.from_predictions(predictions))
    if problem:
        raise UsageError(f'{run.path}: the metrics of {split} {problem}. Run `{run.evaluation(split)}` again.')
    return metrics


def is_of_network(run: Run, facts: dict[str, Any]) -> bool:
    """Return True if `facts` are about the network of `run`, or if the network is not in the folder any more.

    Raises `UsageError` if something else is in its place, such as a pipe.
    """
    try:
        find_network(run.path)
    except UsageError:
        return True
    return bool(facts.get('model') == identify_network(run.path))


def _compare(metrics: dict[str, Any], sample: Sample) -> str:
    """Return which of the `metrics` is not that of `sample`; empty if all fit."""
    try:
        check_object(metrics, METRICS, 'metrics.json', fix='')
    except CXRError as error:
        return f'are damaged ({str(error).removeprefix("metrics.json: ").rstrip(" .")})'
    confusion = ConfusionMatrix(sample, metrics['threshold'])
    expected = {name: THRESHOLD_METRICS[name](confusion)['value'] for name in ('sensitivity', 'specificity')}
    expected['auc'] = RANKING_METRICS['auc'](sample)['value']
    for name, value in expected.items():
        stored = metrics[name]['value']
        is_same = value == stored if value is None or stored is None else abs(value - stored) <= TOLERANCE
        if not is_same:
            return f'say {name} {stored}, but that of predictions.csv is {value}'
    return ''
