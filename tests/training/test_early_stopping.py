"""A training with `patience` ends a phase after that many epochs without a better one, also if it is resumed."""

from dataclasses import replace

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.publishing.model_card import describe_run
from cxr_fastai.training.callbacks import History
from cxr_fastai.training.checkpoint import load_state
from cxr_fastai.training.extending import extend_recipe
from cxr_fastai.training.learner import CXRLearner, recipe_learner
from cxr_fastai.training.saving import save_run
from cxr_fastai.training.training import fit_run

RECIPE = make_recipe('baseline', size=48, batch_size=8, limit=4, seed=5, workers=0, patience=2, valid='official')


class Script(Callback):
    """Replace the AUC of each epoch by a given one, and interrupt before the epoch of the number `stop`."""

    order = History.order + 0.5

    def __init__(self, scores: list[float], stop: int | None = None):
        self.scores = scores
        self.stop = stop

    def before_epoch(self):
        if len(self.history.rows) + 1 == self.stop:
            raise KeyboardInterrupt

    def after_epoch(self):
        self.history.rows[-1]['roc_auc'] = self.scores[len(self.history.rows) - 1]


def with_phases(*phases: Phase, **fields) -> Recipe:
    return replace(RECIPE, phases=phases, **fields)


def new_learner(images, recipe: Recipe) -> CXRLearner:
    set_seed(recipe.seed, reproducible=True)
    return recipe_learner(CXRDataLoaders.from_items(read_items(images, limit=recipe.limit), images, recipe), recipe)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / 'run')


def test_a_phase_ends_after_so_many_epochs_without_a_better_one(images, run, caplog):
    caplog.set_level('INFO', 'cxr_fastai')
    recipe = with_phases(Phase('train', 8, 1e-3))
    best = fit_run(new_learner(images, recipe), recipe, run, cbs=[Script([0.5, 0.6, 0.5, 0.7, 0.6, 0.6, 0.9, 0.9])])
    assert len(run.history) == 6 and best['epoch'] == 4
    assert 'train stops early: no epoch since epoch 4 was better (--patience 2)' in caplog.messages


def test_the_next_phase_begins_and_counts_from_zero(images, run):
    recipe = with_phases(Phase('frozen', 4, 1e-3, True), Phase('fine-tune', 4, 1e-4), patience=1)
    best = fit_run(new_learner(images, recipe), recipe, run, cbs=[Script([0.9, 0.8, 0.7, 0.95, 0.6, 0.6])])
    assert run.history.phase.tolist() == ['frozen', 'frozen', 'fine-tune'] and best['epoch'] == 1


def test_a_training_that_always_improves_is_not_stopped(images, run):
    recipe = with_phases(Phase('train', 3, 1e-3), patience=1)
    fit_run(new_learner(images, recipe), recipe, run, cbs=[Script([0.5, 0.6, 0.7])])
    assert len(run.history) == 3


@pytest.mark.parametrize('stop', [3, 4])
def test_a_resumed_training_keeps_the_count(images, run, stop):
    recipe = with_phases(Phase('train', 8, 1e-3))
    scores = [0.9, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(KeyboardInterrupt):
        fit_run(new_learner(images, recipe), recipe, run, cbs=[Script(scores, stop)])
    assert len(run.history) == stop - 1
    fit_run(new_learner(images, recipe), recipe, run, load_state(run), cbs=[Script(scores)])
    assert len(run.history) == 3


@pytest.mark.parametrize('stop', [3, 4, 5])
def test_an_extension_stops_by_its_own_patience_also_if_it_is_resumed(images, tmp_path, stop):
    recipe = with_phases(Phase('train', 2, 1e-3), Phase('extension', 6, 1e-3, patience=2), patience=0)
    scores = [0.9, 0.5, 0.5, 0.5, 0.5]
    runs = [Run.create(tmp_path / name) for name in ('whole', 'interrupted')]
    fit_run(new_learner(images, recipe), recipe, runs[0], cbs=[Script(scores)])
    with pytest.raises(KeyboardInterrupt):
        fit_run(new_learner(images, recipe), recipe, runs[1], cbs=[Script(scores, stop)])
    fit_run(new_learner(images, recipe), recipe, runs[1], load_state(runs[1]), cbs=[Script(scores)])
    assert [len(run.history) for run in runs] == [4, 4]
    whole, resumed = (load_state(run) for run in runs)
    assert whole['stop_early'] == resumed['stop_early'] == {'worse_epochs': 2}
    assert all(torch.equal(whole['model'][name], resumed['model'][name]) for name in whole['model'])


def test_patience_with_one_cycle_warns_that_the_cycle_is_cut(images, run):
    recipe = with_phases(Phase('train', 2, 1e-3), schedule='one-cycle')
    with pytest.warns(CXRWarning, match='--patience 2 with the schedule one-cycle: the learning rate is lowest at the'):
        fit_run(new_learner(images, recipe), recipe, run)


def test_patience_without_validation_is_refused():
    with pytest.raises(UsageError, match='--patience 2 and --valid none: without validation images no epoch is better'):
        replace(RECIPE, valid='none')
    with pytest.raises(UsageError, match='--patience 3 and --valid none'):
        with_phases(Phase('train', 2, 1e-3, patience=3), valid='none', patience=0)


def test_a_learner_that_stopped_early_is_saved_with_its_recipe(images, tmp_path):
    recipe = with_phases(Phase('train', 5, 1e-3), patience=1, limit=None)
    learn = new_learner(images, recipe)
    learn.add_cb(Script([0.9, 0.8, 0.7, 0.6, 0.5]))
    learn.fit_recipe(recipe)
    learn.remove_cb(Script)
    run = save_run(learn, tmp_path / 'run')
    assert run.recipe == recipe and len(run.history) == 2


def test_the_command_records_an_early_stop_and_can_train_longer(images, tmp_path, capsys):
    folder = tmp_path / 'run'
    options = [
        '--epochs',
        '15',
        '--patience',
        '1',
        '--size',
        '48',
        '--limit',
        '6',
        '--batch-size',
        '8',
        '--workers',
        '0',
    ]
    assert main(['train', '--data', str(images), '--out', str(folder), *options]) == 0
    run = Run.open(folder)
    epochs = len(run.history)
    assert epochs < 15 and run.kept_epoch == epochs - 1 and run.recipe.patience == 1
    end = run.last_event('end')
    assert (end['epochs'], end['stopped_early']) == (epochs, ['train'])
    capsys.readouterr()
    assert main(['train', '--resume', str(folder)]) == 0
    assert f'trained for {epochs} epochs already, so nothing is left to do' in capsys.readouterr().out
    assert extend_recipe(run, epochs + 1).phases[1:] == (Phase('extension', 1, 1e-3),)
    longer = ['train', '--resume', str(folder), '--epochs', str(epochs + 1), '--patience', '3']
    assert main(longer) == 0
    assert run.recipe.patience == 1 and run.recipe.phases[1:] == (Phase('extension', 1, 1e-3, patience=3),)
    assert len(run.history) == epochs + 1 and run.history.phase.iloc[-1] == 'extension'
    assert run.last_event('end')['stopped_early'] == ['train']  # the extension had all its epochs
    log = capsys.readouterr().out
    assert f', {epochs + 1} epochs, of which {epochs} trained already' in log and 'stops early' not in log
    kept = f'of {epochs + 1} (highest validation AUC); train stopped early, after {epochs} of its 15 epochs'
    facts = describe_run(run)
    assert facts['Final model'].endswith(kept)
    assert '1 epoch of extension at learning rate 0.001 with the patience 3;' in facts['Recipe']
    assert facts['Recipe'].endswith('patience 1')
    assert main(longer) == 0 and main(['train', '--resume', str(folder), '--patience', '3']) == 0
    assert capsys.readouterr().out.count('nothing is left to do') == 2
    assert main(['train', '--resume', str(folder), '--patience', '2']) == 2
    assert '--patience 2 and --resume' in capsys.readouterr().err
