"""A full disk or a NaN loss ends a command with one line, and leaves the files of the run intact."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from faults import (
    BATCHES,
    EVALUATION_FILES,
    TRAINING_FILES,
    add_tiny,
    equal,
    full_disk,
    nan_before_batch,
    outcome,
    run_quietly,
    survives_full_disk,
    train_argv,
)
from matplotlib.figure import Figure

from cxr_fastai.cli import robustness_tables
from cxr_fastai.core.errors import CXRError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation import robustness
from cxr_fastai.models.architectures import ARCHS
from cxr_fastai.training import checkpoint
from cxr_fastai.training.checkpoint import load_state, save_state

SLOW_FILES = ('journal.jsonl', 'items.csv', 'recipe.json', 'failure.json')
"""Training files that are written like others."""


@pytest.fixture(scope='module', autouse=True)
def tiny_architecture():
    add_tiny()
    yield
    del ARCHS['tiny']


@pytest.fixture(scope='module')
def two_epochs(once, images) -> Run:
    """A training of two epochs through the command line; not to be changed by a test."""

    def train(folder: Path) -> None:
        assert run_quietly(train_argv(images, folder, epochs=2))[0] == 0

    return Run.open(once('two epochs', train))


@pytest.fixture
def trained(two_epochs, tmp_path) -> Run:
    """A copy of that run, with the state of its first epoch as the previous state."""
    run = Run.open(Path(shutil.copytree(two_epochs.path, tmp_path / 'trained')))
    save_state(run, load_state(run))
    return run


@pytest.mark.parametrize(
    'batch',
    [
        BATCHES + 2,
        pytest.param(BATCHES + 1, marks=pytest.mark.slow),
        pytest.param(2 * BATCHES, marks=pytest.mark.slow),
    ],
)
def test_a_nan_loss_keeps_the_last_good_state_and_the_run_can_be_resumed(images, tmp_path, two_epochs, batch):
    run = Run(tmp_path / 'run')
    with nan_before_batch(batch):
        code, stderr = run_quietly(train_argv(images, run.path, epochs=2))
    assert code == 6 and len(stderr.splitlines()) == 1 and 'the training loss is nan in epoch 2' in stderr
    failure = json.loads((run / 'failure.json').read_text())
    assert (failure['epoch'], failure['batch'], failure['best_epoch']) == (2, batch - BATCHES, 1)
    assert load_state(run)['epochs'] == 1 and (run / 'learner.pkl').is_file()
    assert run_quietly(['train', '--resume', str(run.path)])[0] == 0
    assert equal(outcome(run.path), outcome(two_epochs.path)) and not (run / 'failure.json').exists()


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_FILES else name for name in TRAINING_FILES]
)
def test_a_full_disk_leaves_every_file_of_a_training_intact(images, tmp_path, name):
    assert survives_full_disk(tmp_path, images, name, 60)


def draw_only(name: str, monkeypatch, savefig=Figure.savefig) -> None:
    """Save time by drawing no other figure than `name`."""

    def save_or_stub(figure: Figure, path: Path, **options) -> None:
        if name in str(path):
            savefig(figure, path, **options)
        else:
            path.write_bytes(b'a figure')

    monkeypatch.setattr(Figure, 'savefig', save_or_stub)


@pytest.mark.parametrize(
    'names',
    [
        pytest.param(('predictions.csv', 'roc_test.png', 'robustness.csv'), id='one of each kind'),
        pytest.param(EVALUATION_FILES, id='all', marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_every_file_of_an_evaluation_intact(images, tmp_path, monkeypatch, run, names):
    rows = [('clean', 0), ('noise', 1), ('noise', 2), ('shortcut', 0)]
    table = pd.DataFrame(rows, columns=['corruption', 'strength']).assign(n=2, auc=0.5)
    table = table.assign(auc_low=0.4, auc_high=0.6, sensitivity=1.0, specificity=1.0, threshold=0.5, tta=False)
    monkeypatch.setattr(robustness, 'measure_robustness', lambda *_, **__: table)
    for table_name in ('robustness_table', 'anatomy_table'):
        monkeypatch.setattr(robustness_tables, table_name, lambda _: '')
    evaluated = Path(shutil.copytree(run.path, tmp_path / 'run'))
    argv = ['evaluate', str(evaluated), '--data', str(images), '--robustness']
    assert run_quietly(argv)[0] == 0
    for name in names:
        path = next(evaluated.rglob(name))
        before = path.read_bytes()
        draw_only(name, monkeypatch)
        with full_disk(name, 60):
            code, stderr = run_quietly(argv)
        assert code == 6 and path.read_bytes() == before
        assert f'{name}: cannot be written (File too large)' in stderr and len(stderr.splitlines()) == 1
        assert not list(evaluated.rglob('*.tmp'))


@pytest.mark.parametrize('nth', [1, 2])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_a_save_that_fails_at_a_rename_leaves_a_state(trained, monkeypatch, nth, error):
    replace_files = checkpoint.os.replace
    calls = []

    def fail_at_nth(*paths):
        calls.append(paths)
        if len(calls) == nth:
            raise error
        replace_files(*paths)

    state = load_state(trained)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, 'replace', fail_at_nth)
        with pytest.raises((KeyboardInterrupt, CXRError)):
            save_state(trained, state | {'epochs': 9})
    assert equal(load_state(trained), state) and not list(trained.path.glob('.*.tmp'))
    save_state(trained, state | {'epochs': 9})
    assert load_state(trained)['epochs'] == 9


def test_a_disk_that_is_full_only_when_synced_keeps_the_state(trained, monkeypatch):
    state = load_state(trained)
    before = (trained / 'state.pt').read_bytes()

    def no_space(_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(CXRError, match='state.pt: cannot be written .No space left'):
        patch.setattr(checkpoint.os, 'fsync', no_space)
        save_state(trained, state | {'epochs': 9})
    assert (trained / 'state.pt').read_bytes() == before
