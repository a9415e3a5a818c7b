"""Several runs on the same images are compared by paired tests, and summarised over seeds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runfiles import seal_results
from scipy.stats import binomtest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation import figures
from cxr_fastai.evaluation.comparison import (
    compare,
    compare_runs,
    find_runs,
    mcnemar,
    name_runs,
    same_images,
    summarise_seeds,
)
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.intervals import compare_auc
from cxr_fastai.inference.predictor import Predictor

RNG = np.random.default_rng(0)
TARGS = np.arange(120) < 70
GOOD, FAIR = (np.clip(RNG.normal(0.35 + distance * TARGS, 0.2), 0, 1) for distance in (0.5, 0.2))


def make_table(p, patients=None, paths=None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            'path': np.arange(120) if paths is None else paths,
            'p_pneumonia': p,
            'label': np.where(TARGS, 'PNEUMONIA', 'NORMAL'),
            'patient': np.arange(120) if patients is None else patients,
        }
    )


def test_mcnemar_counts_the_images_on_which_only_one_run_is_correct():
    first = RNG.random(90) < 0.8
    second = RNG.random(90) < 0.6
    test = mcnemar(first, second)
    only_first = (first & ~second).sum()
    only_second = (second & ~first).sum()
    assert (test['only_first'], test['only_second']) == (only_first, only_second)
    expected = binomtest(min(only_first, only_second), only_first + only_second).pvalue
    assert test['p'] == pytest.approx(expected)
    assert mcnemar(first, first)['p'] == 1


def test_runs_are_compared_with_the_first_and_p_values_are_adjusted_by_holm():
    tables = {'fair': make_table(FAIR), 'good': make_table(GOOD), 'twin': make_table(FAIR + 0.0)}
    good, twin = compare(tables, dict.fromkeys(tables, 0.5))
    assert (good['run'], good['against'], good['n'], good['grouped_by_patient']) == ('good', 'fair', 120, False)
    auc = compare_auc(TARGS, GOOD, FAIR)
    assert good['auc'] == auc | {'p_holm': pytest.approx(min(1, 2 * auc['p']))} and auc['value'] > 0
    assert twin['auc']['value'] == 0 and twin['auc']['p_holm'] == twin['mcnemar']['p_holm'] == 1
    json.dumps([good, twin], allow_nan=False)


def test_each_run_is_classified_at_its_own_threshold():
    tables = {'a': make_table(FAIR), 'b': make_table(FAIR / 2)}
    (same,) = compare(tables, {'a': 0.5, 'b': 0.25})
    assert same['mcnemar']['only_first'] == same['mcnemar']['only_second'] == 0
    (other,) = compare(tables, {'a': 0.5, 'b': 0.5})
    assert other['mcnemar']['p'] < 0.05


def test_images_of_the_same_patients_widen_the_interval_of_the_difference_and_increase_its_p_value():
    tables = {'a': make_table(FAIR), 'b': make_table(GOOD * 0.7 + FAIR * 0.3)}
    copies = {
        name: pd.concat([table.assign(path=table.path.astype(str) + suffix) for suffix in 'xyz'])
        for name, table in tables.items()
    }
    (pair,) = compare(tables, dict.fromkeys(tables, 0.5))
    (grouped,) = compare(copies, dict.fromkeys(copies, 0.5))
    independent = compare_auc(*(np.tile(values, 3) for values in (TARGS, GOOD * 0.7 + FAIR * 0.3, FAIR)))
    assert grouped['grouped_by_patient'] and grouped['auc']['value'] == pytest.approx(pair['auc']['value'])
    assert independent['p'] < pair['auc']['p'] < grouped['auc']['p']
    width = independent['high'] - independent['low']
    assert grouped['auc']['high'] - grouped['auc']['low'] == pytest.approx(np.sqrt(3) * width, rel=0.05)


def test_only_images_of_all_runs_are_compared():
    tables = {'a': make_table(FAIR), 'b': make_table(GOOD).sample(frac=0.8, random_state=0)}
    shared = same_images(tables)
    assert len(shared['a']) == 96 and (shared['a'].path == shared['b'].path).all()


def test_runs_with_few_images_in_common_are_not_compared():
    tables = {'a': make_table(FAIR), 'b': make_table(GOOD, paths=np.arange(100, 220))}
    assert same_images(tables) == {}


@pytest.fixture
def two_runs(run, tmp_path) -> Path:
    """A folder with two copies of a run, `a` and `b`, whose recipes differ in the seed."""
    for name, seed in (('a', 1), ('b', 2)):
        copy = tmp_path / 'runs' / name
        shutil.copytree(run.path, copy)
        recipe = json.loads((copy / 'recipe.json').read_text())
        (copy / 'recipe.json').write_text(json.dumps(recipe | {'seed': seed}))
    return tmp_path / 'runs'


def test_runs_are_found_in_folders_and_have_different_names(two_runs, tmp_path):
    runs = find_runs([two_runs])
    assert [run.path.name for run in runs] == ['a', 'b'] == list(name_runs(runs))
    shutil.copytree(two_runs, tmp_path / 'other')
    runs = find_runs([two_runs, tmp_path / 'other'])
    assert list(name_runs(runs)) == ['runs/a', 'runs/b', 'other/a', 'other/b']


def test_a_run_named_twice_and_a_folder_without_runs_are_refused(two_runs, tmp_path):
    with pytest.raises(UsageError, match='named twice'):
        find_runs([two_runs, two_runs / 'a'])
    with pytest.raises(UsageError, match='no such run folder'):
        find_runs([tmp_path / 'nothing'])


def test_compare_runs_writes_the_comparison_into_a_new_folder(two_runs, images, tmp_path):
    runs = find_runs([two_runs])
    for run in runs:
        evaluate(run, images)
    comparison = compare_runs(runs, 'test', tmp_path / 'comparison')
    contents = json.loads((tmp_path / 'comparison/comparison.json').read_text())
    assert list(contents) == ['split', 'runs', 'pairs', 'seeds'] and contents['split'] == 'test'
    assert contents['runs'] == comparison.runs == {name: Run(two_runs / name).metrics['test'] for name in 'ab'}
    assert contents['pairs'] == comparison.pairs and comparison.pairs[0]['auc']['value'] == 0
    assert contents['seeds'] == comparison.seeds
    auc = contents['runs']['a']['auc']['value']
    assert comparison.seeds[0]['auc'] == {'mean': pytest.approx(auc), 'sd': 0}
    assert (tmp_path / 'comparison/comparison.png').read_bytes().startswith(b'\x89PNG')
    assert compare_runs(runs, 'test', tmp_path / 'comparison') == comparison  # in place of the earlier one
    with pytest.raises(UsageError, match='comparison exists already and nothing in it was overwritten'):
        compare_runs(runs[::-1], 'test', tmp_path / 'comparison')


def test_the_command_compares_runs_and_predicts_no_image_twice(two_runs, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])  # the figures take long and are tested elsewhere
    argv = ['evaluate', str(two_runs), '--data', str(images)]
    assert main(argv) == 0
    output = capsys.readouterr().out
    assert 'a, on the same 12 images' in output and '2 seeds: a, b' in output
    assert output.startswith('comparing 2 runs on the test split, in the folder comparison\n')
    assert 'targets:' not in output and output.count('in comparison: comparison.json, comparison.png') == 1

    def refuse(*_):
        raise AssertionError('predicted again')

    monkeypatch.setattr(Predictor, 'scores', refuse)
    results = (tmp_path / 'comparison/comparison.json').read_text()
    assert main([*argv, '--each']) == 0
    output = capsys.readouterr().out
    assert 'comparison: replaces the earlier comparison of these runs' in output
    assert output.index('2 seeds: a, b') < output.index('targets:') and output.count('targets:') == 2
    assert (tmp_path / 'comparison/comparison.json').read_text() == results
    assert not (tmp_path / 'comparison-2').exists()


def test_a_comparison_of_runs_with_and_without_views_warns(two_runs, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])
    assert main(['evaluate', str(two_runs / 'a'), '--data', str(images), '--tta']) == 0
    assert main(['evaluate', str(two_runs), '--data', str(images)]) == 0
    assert 'some of the runs are evaluated with test-time views' in capsys.readouterr().err
    assert main(['evaluate', str(two_runs), '--data', str(images), '--no-tta']) == 0
    assert 'test-time views' not in capsys.readouterr().err


def test_a_comparison_of_other_runs_or_another_file_is_not_replaced(two_runs, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, 'save_figures', lambda *_: [])
    first, second = (str(two_runs / name) for name in 'ab')
    (tmp_path / 'comparison').mkdir()
    (tmp_path / 'comparison/comparison.json').write_text('[]')
    for runs in ([first, second], [second, first]):
        assert main(['evaluate', *runs, '--data', str(images)]) == 0
        assert 'comparison: exists, and is not a comparison of these runs' in capsys.readouterr().out
    assert (tmp_path / 'comparison/comparison.json').read_text() == '[]'
    compared = [json.loads((tmp_path / f'comparison-{n}/comparison.json').read_text())['runs'] for n in (2, 3)]
    assert [list(runs) for runs in compared] == [['a', 'b'], ['b', 'a']]
    assert main(['evaluate', first, second, '--data', str(images), '--out', 'comparison-3']) == 2
    assert 'comparison-3 exists already' in capsys.readouterr().err


def test_the_tables_of_each_run_are_for_several_runs(run, capsys):
    assert main(['evaluate', str(run.path), '--each']) == 2
    assert '--each: the tables of a single run are always printed' in capsys.readouterr().err


def test_a_folder_for_the_comparison_of_one_run_is_refused(run, tmp_path, capsys):
    assert main(['evaluate', str(run.path), '--out', str(tmp_path / 'c')]) == 2
    assert 'only the comparison of several runs' in capsys.readouterr().err


@pytest.fixture
def measured_runs(two_runs) -> dict[str, Run]:
    """Two runs with the same test metrics except the Brier score."""
    for name, brier in (('a', 0.1), ('b', 0.2)):
        names = ('auc', 'average_precision', 'sensitivity', 'specificity', 'balanced_accuracy', 'accuracy', 'mcc')
        metrics = {metric: {'value': 0.8, 'low': None, 'high': None} for metric in names}
        (two_runs / name / 'metrics.json').write_text(json.dumps({'test': metrics | {'brier': brier}}))
        (two_runs / name / 'predictions.csv').write_text('path,label,split,patient,p_pneumonia,prediction,loss\n')
        seal_results(two_runs / name)
    return {name: Run.open(two_runs / name) for name in 'ab'}


def test_runs_with_different_seeds_are_summarised_by_mean_and_standard_deviation(measured_runs):
    (summary,) = summarise_seeds(measured_runs, 'test')
    assert summary['runs'] == ['a', 'b'] and summary['auc'] == {'mean': pytest.approx(0.8), 'sd': pytest.approx(0)}
    assert summary['brier'] == {'mean': pytest.approx(0.15), 'sd': pytest.approx(0.0707, abs=1e-4)}


@pytest.mark.parametrize('change', [{'flip': 0.1}, {'seed': 1}])
def test_runs_with_another_recipe_or_the_same_seed_are_not_summarised(measured_runs, change):
    path = measured_runs['b'] / 'recipe.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert summarise_seeds(measured_runs, 'test') == []


def test_runs_on_other_images_are_not_summarised(measured_runs):
    run = measured_runs['b']
    run.items.iloc[1:].to_csv(run / 'items.csv', index=False)
    assert summarise_seeds(measured_runs, 'test') == []
