"""Phases, history, the best epoch, the plateau, and the same run twice."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch
from fastai.learner import Learner

from cxr_fastai.core.recipe import Phase
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import make_dls
from cxr_fastai.inference.pickles import load_learner
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training import training
from cxr_fastai.training.callbacks import COLUMNS
from cxr_fastai.training.learner import make_learner
from cxr_fastai.training.training import Diverged, fit, train

SMALL = make_recipe('baseline', epochs=2, size=48, batch_size=16, limit=8, seed=5)


@pytest.fixture
def small(images) -> Learner:
    return make_learner(make_dls(read_items(images, limit=8), images, SMALL), SMALL)


def phases(*given) -> tuple[Phase, ...]:
    return tuple(Phase(*fields) for fields in given)


def test_two_runs_with_one_seed_are_the_same(images, tmp_path):
    runs = [train(SMALL, images, tmp_path / name) for name in 'ab']
    other = train(dataclasses.replace(SMALL, seed=6), images, tmp_path / 'c')
    a, b, c = (run.history.drop(columns='seconds') for run in (*runs, other))
    assert a.equals(b) and not a.equals(c)


def test_the_history_has_the_contracts_columns_over_all_phases(small, tmp_path):
    recipe = dataclasses.replace(SMALL, phases=phases(('frozen', 1, 1e-3, True), ('fine-tune', 2, 1e-5)))
    run = Run.create(tmp_path / 'run')
    fit(small, recipe, run)
    assert list(run.history) == COLUMNS
    assert run.history[['phase', 'epoch', 'lr']].values.tolist() == [
        ['frozen', 1, 1e-3],
        ['fine-tune', 2, 1e-5],
        ['fine-tune', 3, 1e-5],
    ]


def test_the_loss_of_the_history_is_the_mean_over_the_epochs_images(small, tmp_path):
    losses = []
    loss_func = small.loss_func
    small.loss_func = lambda pred, targ: losses.append((loss := loss_func(pred, targ)).item()) or loss
    run = Run.create(tmp_path / 'run')
    fit(small, dataclasses.replace(SMALL, phases=phases(('train', 1, 1e-3))), run)
    assert run.history.train_loss[0] == pytest.approx(losses[0])  # 16 images are one batch


def scripted(monkeypatch, small, tmp_path, scores, recipe=SMALL):
    """Fit with validation results (AUC, loss) that are given, and each epoch's weights set to its number."""
    rows = iter(scores)
    after_epoch = training.History.after_epoch

    def replaced(self):
        after_epoch(self)
        self.rows[-1]['roc_auc'], self.rows[-1]['valid_loss'] = next(rows)
        with torch.no_grad():
            self.model[1][-1].bias.fill_(len(self.rows))

    monkeypatch.setattr(training.History, 'after_epoch', replaced)
    run = Run.create(tmp_path / 'run')
    best = fit(small, recipe, run)
    return best, small.model[1][-1].bias[0].item(), run


@pytest.mark.parametrize(
    ('scores', 'best'),
    [
        ([(0.8, 0.5), (0.9, 0.9), (0.7, 0.1)], 2),  # by AUC, in whichever phase
        ([(0.9, 0.5), (0.9, 0.4), (0.9, 0.4)], 2),  # by loss where the AUC ties, the first where that does too
        ([(math.nan, 0.5), (math.nan, 0.6), (math.nan, 0.3)], 3),  # by loss where it is undefined
    ],
)
def test_the_best_epoch_is_kept_across_phases(monkeypatch, small, tmp_path, scores, best):
    recipe = dataclasses.replace(SMALL, phases=phases(('one', 1, 1e-3), ('two', 2, 1e-3)))
    row, weights, _ = scripted(monkeypatch, small, tmp_path, scores, recipe)
    assert (row['epoch'], weights) == (best, best)


def poisoned(monkeypatch, event):
    """Let a weight become NaN at the first `event` of the second epoch."""

    def poison(self):
        if self.history.rows:
            self.model[0][0][0].weight.data.fill_(math.nan)

    monkeypatch.setattr(training.History, event, poison, raising=False)


def test_a_loss_that_is_no_number_ends_training_with_the_best_epoch_before_it(monkeypatch, small, tmp_path):
    poisoned(monkeypatch, 'before_batch')
    run = Run.create(tmp_path / 'run')
    recipe = dataclasses.replace(SMALL, phases=phases(('one', 1, 1e-3), ('two', 2, 1e-4)))
    with pytest.raises(Diverged, match='of training is nan in epoch 2, batch 1, .*; epoch 1, .* is kept') as failed:
        fit(small, recipe, run)
    assert failed.value.exit_code == 6 and failed.value.best['epoch'] == 1 and len(run.history) == 1
    assert all(torch.isfinite(parameter).all() for parameter in small.model.parameters())
    assert json.loads((run / 'failure.json').read_text()) == {
        'phase': 'two',
        'epoch': 2,
        'where': 'training',
        'batch': 1,
        'loss': 'nan',
        'lr': 1e-4,
        'best_epoch': 1,
    }


def test_a_validation_loss_that_is_no_number_ends_training_too(monkeypatch, small, tmp_path):
    poisoned(monkeypatch, 'before_validate')
    run = Run.create(tmp_path / 'run')
    with pytest.raises(Diverged, match='loss of validation is nan in epoch 2, so training ended; epoch 1'):
        fit(small, SMALL, run)
    assert len(run.history) == 1


def test_without_an_epoch_before_it_there_is_no_network_to_keep(images, tmp_path):
    hopeless = dataclasses.replace(SMALL, batch_size=4, phases=phases(('train', 2, 1e30)))
    with pytest.raises(Diverged, match='no epoch came before it. Train again with a lower --lr'):
        train(hopeless, images, tmp_path / 'run')
    assert not (tmp_path / 'run/learner.pkl').exists()


def test_a_training_that_diverges_leaves_the_best_network_so_far(monkeypatch, images, tmp_path):
    poisoned(monkeypatch, 'before_batch')
    with pytest.raises(Diverged):
        train(SMALL, images, tmp_path / 'run')
    network = load_learner(tmp_path / 'run/learner.pkl').model
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_a_plateau_of_the_validation_loss_lowers_the_learning_rate_for_good(monkeypatch, small, tmp_path):
    recipe = dataclasses.replace(SMALL, phases=phases(('train', 6, 1e-3)), plateau_factor=0.1, plateau_patience=1)
    losses = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
    _, _, run = scripted(monkeypatch, small, tmp_path, [(0.5, loss) for loss in losses], recipe)
    assert run.history.lr.tolist() == pytest.approx([1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5])


def test_one_class_validation_trains_by_loss(images, tmp_path):
    items = read_items(images, limit=6)
    kept = items[(items.split != 'valid') | (items.label == 'NORMAL')]
    table = kept.assign(path=[str(images / path) for path in kept.path])
    table.to_csv(tmp_path / 'images.csv', index=False)
    with pytest.warns(UserWarning, match='5 NORMAL and 0 PNEUMONIA'):
        run = train(SMALL, tmp_path / 'images.csv', tmp_path / 'run')
    assert run.history.roc_auc.isna().all() and run.noted('end')['best']['epoch'] == run.history.valid_loss.idxmin() + 1


def test_the_run_folder_tells_what_was_done(run, images):
    assert run.recipe.size == 64 and run.items.equals(pd.DataFrame(read_items(images)))
    start = run.noted('start')
    assert {'time', 'data', 'device', 'python', 'torch', 'fastai', 'cxr_fastai'} <= set(start)
    assert run.noted('end')['best']['epoch'] in run.history.epoch.to_list()


@pytest.mark.parametrize(
    ('options', 'reached'),
    [
        (['--epochs', '3'], lambda r, learn: r.epochs == 3),
        (['--lr', '0.005'], lambda r, learn: r.phases[0].lr == 0.005),
        (['--valid', 'patients'], lambda r, learn: r.valid == 'patients' and len(learn.dls.valid_ds) < 12),
        (['--size', '56'], lambda r, learn: learn.dls.one_batch()[0].shape[-2:] == (56, 56)),
        (['--batch-size', '5'], lambda r, learn: learn.dls.train.bs == learn.dls.valid.bs == 5),
        (['--workers', '2'], lambda r, learn: learn.dls.train.fake_l.num_workers == 2),
        (['--limit', '4'], lambda r, learn: len(learn.dls.train_ds) == 8),
        (['--seed', '9'], lambda r, learn: r.seed == 9 and torch.initial_seed() == 9),
        (['--arch', 'resnet50', '--weights', 'none'], lambda r, learn: hasattr(learn.model[0], 'layer4')),
    ],
)
def test_every_option_of_train_reaches_its_target(images, tmp_path, monkeypatch, options, reached):
    from cxr_fastai.cli import main

    seen = []
    monkeypatch.setattr(training, 'fit', lambda learn, recipe, *_: seen.append((recipe, learn)) or {})
    assert main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), *options]) == 0
    recipe, learn = seen[0]
    assert reached(recipe, learn) and Run.open(tmp_path / 'run').recipe == recipe


def test_weights_from_a_file_reach_the_network(images, tmp_path, monkeypatch):
    from cxr_fastai.cli import main
    from cxr_fastai.models.architectures import build_model

    state = build_model('baseline').state_dict()
    torch.save(state, tmp_path / 'w.pth')
    seen = []
    monkeypatch.setattr(training, 'fit', lambda learn, *_: seen.append(learn) or {})
    assert (
        main(['train', '--data', str(images), '--out', str(tmp_path / 'run'), '--weights', str(tmp_path / 'w.pth')])
        == 0
    )
    assert all(torch.equal(value, state[key]) for key, value in seen[0].model.state_dict().items())


def test_a_terminal_gets_a_bar_and_the_log_plain_lines(small, tmp_path, terminal, caplog):
    caplog.set_level('INFO', 'cxr_fastai')
    with terminal.used():
        fit(small, SMALL, Run.create(tmp_path / 'run'))
    assert 'validation' in terminal.getvalue()
    assert sum('AUC' in line for line in caplog.messages) == 2 and not any('\x1b' in line for line in caplog.messages)


@pytest.mark.real
@pytest.mark.slow
def test_real_images_go_the_whole_way(real_images, tmp_path):
    from cxr_fastai.cli import main

    run = tmp_path / 'run'
    assert (
        main(
            [
                'train',
                '--data',
                str(real_images),
                '--out',
                str(run),
                '--valid',
                'patients',
                '--limit',
                '60',
                '--size',
                '64',
                '--epochs',
                '2',
            ]
        )
        == 0
    )
    assert main(['evaluate', str(run), '--split', 'valid']) == 0
    assert Run.open(run).metrics['valid']['n'] == 120
