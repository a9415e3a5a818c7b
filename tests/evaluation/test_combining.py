"""Runs are combined into a run that all commands accept, and nothing is judged on test images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series
from cxr_fastai.evaluation import combined_runs, robustness, selection
from cxr_fastai.evaluation.combined_runs import merge_histories, merge_items
from cxr_fastai.evaluation.combining import combine
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.config import identify_network, logits
from cxr_fastai.inference.predictor import Predictor, load_undecided
from cxr_fastai.interpretation.explainer import Explainer
from cxr_fastai.models.architectures import build_model, make_recipe
from cxr_fastai.models.inputs import to_input
from cxr_fastai.publishing.exporting import export
from cxr_fastai.publishing.model_card import describe_run, reproduce
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.series import train_folds, train_seeds
from cxr_fastai.training.training import train

SETTINGS = {'epochs': 1, 'size': 32, 'batch_size': 8, 'seed': 3, 'workers': 0}


@pytest.fixture(scope='module')
def folder(once, images) -> Path:
    """Three runs from the same initial weights with the same validation images; not to be changed by a test."""

    def make(folder: Path) -> None:
        folder.mkdir()
        torch.manual_seed(0)
        torch.save(build_model('baseline').state_dict(), folder / 'initial.pt')
        for name, lr in {'a': 1e-3, 'b': 3e-3, 'c': 5e-3}.items():
            settings = {'weights': str(folder / 'initial.pt'), 'valid': 'patients', 'valid_pct': 0.4, 'lr': lr}
            train(make_recipe('baseline', **SETTINGS, **settings), images, folder / name)

    return once('members', make)


@pytest.fixture(scope='module')
def members(folder) -> list[Run]:
    return [Run.open(folder / name) for name in 'abc']


@pytest.fixture(scope='module')
def ensemble(once, members) -> Run:
    """An ensemble of the three runs; not to be changed by a test."""
    return Run.open(once('ensemble', lambda folder: combine(members, folder, 'ensemble')))


@pytest.fixture(scope='module')
def folds(once, images) -> Series:
    recipe = make_recipe('baseline', **SETTINGS)
    return Series.open(once('combined_folds', lambda folder: train_folds(recipe, images, folder, 2)))


@pytest.fixture
def few_corruptions(monkeypatch) -> None:
    """Judge combinations on fewer and smaller images, which takes less time."""
    monkeypatch.setattr(robustness, 'STRENGTHS', (2,))
    monkeypatch.setattr(robustness, 'SQUARE_SIZE', 48)
    monkeypatch.setattr(selection, 'MIN_IMAGES', 5)


def squares(images: Path, run: Run, split: str) -> np.ndarray:
    """The images of a split as the network sees them."""
    preprocessing = Preprocessing.of(run.recipe)
    return np.stack([preprocessing.load(images / path) for path in run.items.query('split == @split').path])


def test_an_ensemble_returns_the_mean_logits_of_its_runs(ensemble, members, images):
    seen = squares(images, members[0], 'valid')
    expected = np.mean([logits(load_undecided(run).scores(seen)) for run in members], axis=0)
    assert logits(load_undecided(ensemble).scores(seen)) == pytest.approx(expected, abs=1e-4)
    assert ensemble.recipe.arch == 'ensemble3.baseline'


def test_the_learner_of_an_ensemble_opens_with_load_learner(ensemble, members, images):
    seen = squares(images, members[0], 'valid')[:4]
    learn = load_learner(ensemble / 'learner.pkl')
    with torch.no_grad():
        p = learn.model.eval()(to_input(seen)).double().softmax(dim=1)[:, 1]
    assert p.numpy() == pytest.approx(load_undecided(ensemble).scores(seen), abs=1e-6)
    assert Predictor.load(ensemble / 'learner.pkl').scores(seen) == pytest.approx(p.numpy(), abs=1e-6)


def test_an_ensemble_is_evaluated_explained_described_and_exported(ensemble, members, images, tmp_path):
    run = Run(shutil.copytree(ensemble.path, tmp_path / 'run'))
    metrics = evaluate(run)
    assert metrics['n'] == len(run.predicted('test')) and run.decision['valid']['n'] == len(run.predicted('valid'))
    seen = squares(images, run, 'valid')[:3]
    assert Explainer.load(run.path).maps(seen).shape == seen.shape
    facts = describe_run(run)
    assert 'mean logits of 3 networks' in facts['Final model'] and facts['Architecture'].startswith(
        'ensemble3.baseline'
    )
    commands = reproduce(run, 'test').splitlines()
    assert [line.split()[1] for line in commands] == ['train'] * 3 + ['combine', 'evaluate', 'report']
    assert commands[1].endswith('--out RUN-2') and '--lr 0.003' in commands[1] and '--arch baseline' in commands[1]
    bundle = export(run)  # verified in a new process, with ONNX Runtime if it is installed
    predictor = Predictor.load(bundle, gate=False)
    assert predictor.scores(seen) == pytest.approx(load_undecided(run).scores(seen), abs=1e-4)


def test_a_soup_has_mean_weights_and_statistics_of_training_images(members, images, tmp_path):
    soup = combine(members[:2], tmp_path / 'soup', 'soup').run
    states = [load_undecided(run).model.state_dict() for run in (*members[:2], soup)]
    for name, tensor in states[2].items():
        if 'running' not in name and 'num_batches' not in name:
            expected = (states[0][name].double() + states[1][name].double()) / 2
            assert torch.allclose(tensor.double(), expected, atol=1e-7), name
    seen = squares(images, soup, 'train')  # 29 images, in another order: one batch, so that the order has no effect
    assert len(seen) <= 32
    model = load_undecided(soup).model
    with torch.no_grad():
        activations = model[0][0][0](to_input(seen)).numpy().astype(np.float64)
    assert states[2]['0.0.1.running_mean'].numpy() == pytest.approx(activations.mean(axis=(0, 2, 3)), abs=1e-4)
    assert states[2]['0.0.1.running_var'].numpy() == pytest.approx(activations.var(axis=(0, 2, 3), ddof=1), rel=1e-3)
    again = combine(members[:2], tmp_path / 'again', 'soup').run
    assert identify_network(again.path) == identify_network(soup.path)


@pytest.mark.parametrize('how', ['soup', 'ensemble'])
def test_a_run_and_its_copy_give_the_same_predictions(how, members, images, tmp_path):
    copy = shutil.copytree(members[0].path, tmp_path / 'copy')
    combination = combine([members[0], copy], tmp_path / 'out', how)
    seen = squares(images, members[0], 'valid')
    expected = load_undecided(members[0]).scores(seen)
    assert load_undecided(combination.run).scores(seen) == pytest.approx(expected, abs=1e-7)


def test_the_folder_is_a_run_with_the_names_and_hashes_of_its_members(ensemble, members):
    event = ensemble.last_event('combine')
    assert [member['name'] for member in event['members']] == ['a', 'b', 'c'] and event['how'] == 'ensemble'
    assert [member['model'] for member in event['members']] == [identify_network(run.path) for run in members]
    assert ensemble.last_event('end') and ensemble.images == members[0].images
    assert ensemble.items.split.to_list() == members[0].items.split.to_list()
    assert ensemble.history.phase.to_list() == ['1: train', '2: train', '3: train']
    assert ensemble.history.epoch.to_list() == [1, 2, 3]


def test_auto_keeps_a_single_network_a_soup_or_an_ensemble(members, images, tmp_path, few_corruptions):
    without_test = shutil.copytree(images, tmp_path / 'images')
    shutil.rmtree(without_test / 'test')
    combination = combine(members, tmp_path / 'first', data=without_test)
    again = combine(members, tmp_path / 'again', data=without_test)
    assert again.selection == combination.selection
    assert identify_network(again.run.path) == identify_network(combination.run.path)
    chosen = combination.selection.chosen
    assert (combination.how, combination.members) == (chosen.how, chosen.members)
    highest = max(candidate.score for candidate in combination.selection.contenders)
    assert chosen.score >= highest - selection.MARGIN
    assert {single.members[0] for single in combination.selection.singles} == {'a', 'b', 'c'}
    candidates = combination.run.last_event('combine')['candidates']
    assert candidates[0]['score'] == combination.selection.singles[0].score
    assert evaluate(combination.run, without_test, 'valid')['n'] > 0


def test_the_scores_are_those_of_the_robustness(members, images, tmp_path, few_corruptions):
    root, items = find_split(members[0], None, 'valid')
    predictor = load_undecided(members[0])
    table = robustness.measure_robustness(predictor, items, root)
    expected = robustness.summarise(table)
    (single,) = [c for c in combine(members[:2], tmp_path / 'out').selection.singles if c.members == ('a',)]
    assert [single.clean, single.corrupted, single.shortcut] == pytest.approx(
        [expected['clean'], expected['corrupted'], expected['shortcut']]
    )


@pytest.fixture(scope='module')
def viewed(once, members) -> list[Run]:
    """Copies of two of the runs that were evaluated with test-time views; not to be changed by a test."""

    def make(folder: Path) -> None:
        for run in members[:2]:
            evaluate(shutil.copytree(run.path, folder / run.path.name), tta=True)

    folder = once('viewed_members', make)
    return [Run.open(folder / name) for name in 'ab']


def test_a_combination_of_runs_evaluated_with_views_is_judged_and_evaluated_with_them(
    viewed, members, tmp_path, few_corruptions
):
    combination = combine(viewed, tmp_path / 'auto')
    root, items = find_split(members[0], None, 'valid')
    expected = robustness.measure_robustness(replace(load_undecided(viewed[0]), tta=True), items, root)
    (single,) = [c for c in combination.selection.singles if c.members == ('a',)]
    assert single.corrupted == pytest.approx(robustness.summarise(expected)['corrupted'])
    run = combine(viewed, tmp_path / 'ensemble', 'ensemble').run
    ensemble = robustness.measure_robustness(replace(load_undecided(run), tta=True), items, root)
    judge = selection.Judge.open(items, root, Preprocessing.of(run.recipe), 32, tta=True)
    scores = selection.mean_logits([judge.predict(load_undecided(member)) for member in viewed])
    judged = judge.candidate('ensemble', 'ab', scores)
    assert judged.corrupted == pytest.approx(robustness.summarise(ensemble)['corrupted'], abs=1e-6)
    assert combination.tta and evaluate(run)['tta'] and run.decision['tta']
    assert not evaluate(run, tta=False)['tta'] and not evaluate(run)['tta']  # the user has the last word


def test_runs_evaluated_with_and_without_views_are_not_combined(viewed, members, tmp_path):
    plain = Run(shutil.copytree(members[1].path, tmp_path / 'b'))
    assert combine([viewed[0], plain], tmp_path / 'first', 'ensemble').tta  # b was not evaluated
    evaluate(plain)
    with pytest.raises(UsageError, match='a: evaluated with test-time .*, and b without them.* --split valid --tta`'):
        combine([viewed[0], plain], tmp_path / 'second', 'ensemble')
    assert not (tmp_path / 'second').exists()


def test_auto_without_common_initial_weights_considers_no_soup(members, tmp_path, few_corruptions, images):
    other = train(
        make_recipe('baseline', **SETTINGS, weights='none', valid='patients', valid_pct=0.4), images, tmp_path / 'other'
    )
    contenders = combine([members[0], other], tmp_path / 'out').selection.contenders
    assert 'soup' not in [candidate.how for candidate in contenders]


def test_few_shared_validation_images_are_refused_by_auto(members, tmp_path):
    with pytest.raises(UsageError, match='--how auto: the runs share .* NORMAL .* 10 of each class are needed'):
        combine(members, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_folds_are_combined_with_their_out_of_fold_predictions(folds, tmp_path):
    copy = Series.open(shutil.copytree(folds.path, tmp_path / 'folds'))
    with pytest.raises(UsageError, match='a training image of all folds but one.*--how ensemble'):
        combine(copy.path, tmp_path / 'auto')
    run = combine(copy.path, tmp_path / 'out', 'ensemble').run
    table = pd.read_csv(run / 'out_of_fold.csv')
    assert (run / 'out_of_fold.csv').read_bytes() == (copy.path / 'out_of_fold.csv').read_bytes()
    assert set(table.fold) == {'fold-0', 'fold-1'}
    items = run.items
    assert set(items.split) == {'train', 'test'} and set(items[items.split == 'train'].path) == set(table.path)


def test_seeds_are_combined_by_their_folder(images, tmp_path):
    series = train_seeds(make_recipe('baseline', **SETTINGS, valid='official'), images, tmp_path / 'seeds', 2)
    combination = combine(series.path, tmp_path / 'out', 'ensemble')
    assert combination.members == ('seed-3', 'seed-4') and describe_run(combination.run)['Seed'] == '3, 4'
    with pytest.raises(UsageError, match='a folder of several runs. Combine it alone'):
        combine([series.path, combination.run.path], tmp_path / 'more', 'ensemble')


def changed(run: Run, folder: Path, **fields) -> Run:
    """A copy of `run` whose recipe has other `fields`."""
    copy = shutil.copytree(run.path, folder)
    recipe = copy / 'recipe.json'
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | fields))
    return Run.open(copy)


@pytest.mark.parametrize(
    ('fields', 'how', 'reason'),
    [
        ({'size': 64}, 'ensemble', 'changed has size 64, and a has 32'),
        ({'resize': 'pad'}, 'soup', "changed has resize 'pad', and a has 'squish'"),
        ({'low_pass': 0.01}, 'auto', 'changed has low_pass 0.01, and a has 0.0'),
        ({'modality': 'RG'}, 'ensemble', "changed has modality 'RG'"),
        ({'arch': 'resnet50'}, 'ensemble', "changed has arch 'resnet50', and a has 'baseline'"),
        ({'arch': 'ensemble2.baseline'}, 'ensemble', 'ensemble2.baseline is an ensemble already'),
        ({'weights': 'none'}, 'soup', 'changed started from random weights'),
        ({'weights': 'own'}, 'soup', 'changed started from weights that are not recorded'),
        ({'weights': 'imagenet'}, 'soup', 'changed started from the weights imagenet, and a from'),
        ({}, 'best', '--how best: choose auto, soup, ensemble'),
    ],
)
def test_runs_that_do_not_fit_are_refused(fields, how, reason, members, tmp_path):
    other = changed(members[0], tmp_path / 'changed', **fields)
    with pytest.raises(UsageError, match=reason):
        combine([members[0], other], tmp_path / 'out', how)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['changed']


def test_the_runs_are_named_once_and_finished(members, tmp_path):
    with pytest.raises(UsageError, match='is named twice. Name each run once'):
        combine([members[0], members[0].path], tmp_path / 'out')
    with pytest.raises(UsageError, match='at least two runs are needed'):
        combine(members[0], tmp_path / 'out')
    unfinished = Path(shutil.copytree(members[0].path, tmp_path / 'unfinished'))
    for name in ('model.safetensors', 'learner.pkl'):
        (unfinished / name).unlink()
    with pytest.raises(UsageError, match='interrupted|has not finished'):
        combine([members[0], unfinished], tmp_path / 'out', 'ensemble')
    with pytest.raises(UsageError, match='exists already'):
        combine(members, members[0].path, 'ensemble')


def test_images_in_another_place_are_named_with_data(members, images, tmp_path):
    moved = Run(shutil.copytree(members[1].path, tmp_path / 'moved'))
    journal = moved / 'journal.jsonl'
    journal.write_text(journal.read_text().replace(json.dumps(str(images)), json.dumps('/elsewhere')))
    with pytest.raises(UsageError, match='/elsewhere.*with --data'):
        combine([members[0], moved], tmp_path / 'out', 'ensemble')
    assert combine([members[0], moved], tmp_path / 'out', 'ensemble', images).run.images == images.resolve()


def test_nothing_is_left_if_the_run_cannot_be_written(members, tmp_path, monkeypatch):
    def fail(*_):
        raise OutputError('the disk is full.')

    monkeypatch.setattr(combined_runs, 'save_learner', fail)
    with pytest.raises(OutputError, match='full'):
        combine(members, tmp_path / 'out', 'ensemble')
    assert list(tmp_path.iterdir()) == []


def test_an_image_is_a_training_image_if_it_is_one_of_any_run():
    def table(**splits: str) -> pd.DataFrame:
        rows = [(path, 'NORMAL', split, '1', 'normal') for path, split in splits.items()]
        return pd.DataFrame(rows, columns=['path', 'label', 'split', 'patient', 'kind'])

    first = table(a='train', b='valid', c='valid', d='test', e='test', f='valid')
    second = table(a='valid', b='valid', c='train', d='test', e='valid', g='test')
    merged = merge_items([first, second])
    expected = {'a': 'train', 'b': 'valid', 'c': 'train', 'd': 'test', 'e': 'train', 'f': 'train', 'g': 'test'}
    assert dict(zip(merged.path, merged.split, strict=True)) == expected
    with pytest.raises(UsageError, match='a: the runs have different labels'):
        merge_items([first, second.assign(label='PNEUMONIA')])


def test_a_single_history_is_kept():
    history = pd.DataFrame({'phase': ['train'], 'epoch': [4]})
    assert merge_histories([history]) is history
