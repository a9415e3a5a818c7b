"""`check_results` returns metrics that belong to the files of the run, and refuses all others with what to do."""

import json
import shutil

import pytest
from runfiles import seal_results
from safetensors.torch import load_file, save_file

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.results import check_results, is_of_network


@pytest.fixture
def copy(evaluated, tmp_path) -> Run:
    """A copy of the evaluated run, to be changed."""
    return Run(shutil.copytree(evaluated.path, tmp_path / 'run'))


def change_metrics(run: Run, **fields: object) -> None:
    """Change the metrics of the test split, with hashes that fit."""
    metrics = json.loads((run / 'metrics.json').read_text())
    metrics['test'] |= fields
    (run / 'metrics.json').write_text(json.dumps(metrics))
    seal_results(run.path)


def test_the_metrics_of_an_honest_run_are_returned(evaluated):
    for split in evaluated.metrics:
        assert check_results(evaluated, split) == evaluated.metrics[split]


def test_metrics_with_less_than_all_are_of_an_older_version(copy):
    metrics = copy.metrics
    incomplete = {name: value for name, value in metrics['test'].items() if name != 'mcc'}
    for old in ({'n': 12, 'auc': metrics['test']['auc']}, incomplete):
        (copy / 'metrics.json').write_text(json.dumps(metrics | {'test': old}))
        seal_results(copy.path)
        with pytest.raises(UsageError, match='older version.*Run `cxr-fastai evaluate'):
            check_results(copy, 'test')


def test_metrics_of_other_predictions_are_refused(copy):
    copy.predictions.iloc[1:].to_csv(copy / 'predictions.csv', index=False)
    with pytest.raises(UsageError, match='are of other predictions than those in predictions.csv'):
        check_results(copy, 'test')
    seal_results(copy.path)
    with pytest.raises(UsageError, match=r'are of \d+ images, but predictions.csv contains'):
        check_results(copy, 'test')


@pytest.mark.parametrize('name', ['auc', 'sensitivity', 'specificity'])
def test_metrics_are_computed_again(name, copy):
    estimate = copy.metrics['test'][name] | {'value': 0.123}
    change_metrics(copy, **{name: estimate})
    with pytest.raises(UsageError, match=f'say {name} 0.123, but that of predictions.csv is'):
        check_results(copy, 'test')


@pytest.mark.parametrize('fields', [{'threshold': 0.001}, {'threshold_rule': 'youden'}])
def test_metrics_at_another_threshold_than_the_decision_are_refused(fields, copy):
    change_metrics(copy, **fields)
    with pytest.raises(UsageError, match='another decision than that in decision.json'):
        check_results(copy, 'test')


def test_results_of_another_network_are_refused_and_those_without_a_network_are_not(copy):
    save_file(load_file(copy / 'model.safetensors'), copy / 'model.safetensors', {'another': 'network'})
    with pytest.raises(UsageError, match='of another network'):
        check_results(copy, 'test')
    for name in ('model.safetensors', 'learner.pkl'):
        (copy / name).unlink()
    assert check_results(copy, 'test') and is_of_network(copy, {'model': 'a' * 64})
