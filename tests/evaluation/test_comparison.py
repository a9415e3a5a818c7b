"""Several runs on the same images: what sets them apart, by tests that know they are paired."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.comparison import compare, find_runs, mcnemar, name_runs, same_images, summarise_seeds
from cxr_fastai.evaluation.intervals import compare_auc

RNG = np.random.default_rng(0)
TARGS = np.arange(120) < 70


def table(p, patients=None, paths=None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            'path': np.arange(120) if paths is None else paths,
            'p_pneumonia': p,
            'label': np.where(TARGS, 'PNEUMONIA', 'NORMAL'),
            'patient': np.arange(120) if patients is None else patients,
        }
    )


GOOD, FAIR = (np.clip(RNG.normal(0.35 + gap * TARGS, 0.2), 0, 1) for gap in (0.5, 0.2))


def test_mcnemar_counts_where_one_alone_is_right():
    first, second = RNG.random(90) < 0.8, RNG.random(90) < 0.6
    found = mcnemar(first, second)
    a, b = (first & ~second).sum(), (second & ~first).sum()
    assert (found['only_first'], found['only_second']) == (a, b)
    assert found['p'] == pytest.approx(binomtest(min(a, b), a + b).pvalue)
    assert mcnemar(first, first)['p'] == 1


def test_runs_are_compared_with_the_first_and_adjusted_by_holm():
    tables = {'fair': table(FAIR), 'good': table(GOOD), 'twin': table(FAIR + 0.0)}
    good, twin = compare(tables, dict.fromkeys(tables, 0.5))
    assert (good['run'], good['against'], good['n'], good['p_patients']) == ('good', 'fair', 120, None)
    auc = compare_auc(TARGS, GOOD, FAIR)
    assert good['auc'] == auc | {'p_holm': pytest.approx(min(1, 2 * auc['p']))} and auc['value'] > 0
    assert twin['auc']['value'] == 0 and twin['auc']['p_holm'] == twin['mcnemar']['p_holm'] == 1
    json.dumps([good, twin], allow_nan=False)


def test_each_run_is_judged_at_its_own_threshold():
    tables = {'a': table(FAIR), 'b': table(FAIR / 2)}
    (same,) = compare(tables, {'a': 0.5, 'b': 0.25})
    assert same['mcnemar']['only_first'] == same['mcnemar']['only_second'] == 0
    (other,) = compare(tables, {'a': 0.5, 'b': 0.5})
    assert other['mcnemar']['p'] < 0.05


def test_images_of_one_patient_make_a_difference_less_sure():
    rough = np.round(FAIR, 1)
    tables = {'a': table(rough, np.arange(120) // 10), 'b': table(GOOD, np.arange(120) // 10)}
    (found,) = compare(tables, dict.fromkeys(tables, 0.5))
    assert 0 < found['p_patients'] < 0.2
    copies = {
        name: pd.concat([one.assign(path=one.path.astype(str) + end) for end in 'xyz'])
        for name, one in {'a': table(FAIR), 'b': table(GOOD * 0.7 + FAIR * 0.3)}.items()
    }
    (found,) = compare(copies, dict.fromkeys(copies, 0.5))
    assert found['auc']['p'] < found['p_patients'] == found['p_patients_holm']


def test_only_images_that_all_have_are_compared():
    tables = {'a': table(FAIR), 'b': table(GOOD).sample(frac=0.8, random_state=0)}
    shared = same_images(tables)
    assert len(shared['a']) == 96 and (shared['a'].path == shared['b'].path).all()
    others = {'a': table(FAIR), 'b': table(GOOD, paths=np.arange(100, 220))}
    assert same_images(others) == {}


@pytest.fixture
def two(run, images, tmp_path):
    for name, seed in (('a', 1), ('b', 2)):
        shutil.copytree(run.path, tmp_path / 'runs' / name)
        recipe = json.loads((run / 'recipe.json').read_text()) | {'seed': seed}
        (tmp_path / 'runs' / name / 'recipe.json').write_text(json.dumps(recipe))
    return tmp_path / 'runs'


def test_runs_are_found_in_folders_and_named_apart(two, tmp_path):
    assert [run.path.name for run in find_runs([two])] == ['a', 'b'] == list(name_runs(find_runs([two])))
    shutil.copytree(two, tmp_path / 'other')
    assert list(name_runs(find_runs([two, tmp_path / 'other']))) == ['runs/a', 'runs/b', 'other/a', 'other/b']
    with pytest.raises(UsageError, match='named twice'):
        find_runs([two, two / 'a'])
    with pytest.raises(UsageError, match='is not a run folder'):
        find_runs([tmp_path / 'nothing'])


def test_the_command_compares_averages_seeds_and_predicts_nothing_twice(two, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('cxr_fastai.evaluation.figures.save_figures', lambda *_: [])
    argv = ['evaluate', str(two), '--data', str(images)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert 'against a, on the same 12 images' in shown and '2 seeds: a, b' in shown
    found = json.loads((tmp_path / 'comparison/comparison.json').read_text())
    assert found['pairs'][0]['auc']['value'] == 0 and set(found['runs']) == {'a', 'b'}
    metrics = found['runs']['a']
    assert found['seeds'][0]['auc'] == {'mean': pytest.approx(metrics['auc']['value']), 'sd': 0}
    assert (tmp_path / 'comparison/comparison.png').read_bytes().startswith(b'\x89PNG')

    def refuse(*_):
        raise AssertionError('predicted again')

    monkeypatch.setattr('cxr_fastai.inference.predictor.Predictor.scores', refuse)
    assert main(argv) == 0
    assert (tmp_path / 'comparison/comparison.json').read_text() == (
        tmp_path / 'comparison-2/comparison.json'
    ).read_text()


def test_one_run_has_no_comparison(run, tmp_path, capsys):
    assert main(['evaluate', str(run.path), '--out', str(tmp_path / 'c')]) == 2
    assert 'is for several runs' in capsys.readouterr().err


def test_seeds_are_averaged_only_where_the_recipe_is_the_same(two):
    metrics = {name: 0.5 for name in ('brier',)} | {
        name: {'value': 0.8, 'low': None, 'high': None}
        for name in ('auc', 'average_precision', 'sensitivity', 'specificity', 'balanced_accuracy', 'accuracy', 'mcc')
    }
    for i, name in enumerate('ab'):
        (two / name / 'metrics.json').write_text(json.dumps({'test': metrics | {'brier': 0.1 * (i + 1)}}))
    runs = {name: Run.open(two / name) for name in 'ab'}
    (found,) = summarise_seeds(runs, 'test')
    assert found['runs'] == ['a', 'b']
    assert found['brier'] == {'mean': pytest.approx(0.15), 'sd': pytest.approx(0.0707, abs=1e-4)}
    recipe = json.loads((two / 'b/recipe.json').read_text())
    for other in ({'flip': 0.1}, {'seed': 1}):  # another recipe, the same seed
        (two / 'b/recipe.json').write_text(json.dumps(recipe | other))
        assert summarise_seeds(runs, 'test') == []
    (two / 'b/recipe.json').write_text(json.dumps(recipe))
    runs['b'].items.iloc[1:].to_csv(two / 'b/items.csv', index=False)  # other images
    assert summarise_seeds(runs, 'test') == []
