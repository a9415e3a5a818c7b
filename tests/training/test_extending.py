"""A finished run is left as it is, or trained longer by a further phase, which its folder records."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import Phase
from cxr_fastai.core.recipe_texts import command_line
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.training.extending import extend_recipe
from cxr_fastai.training.training import train

RECIPE = make_recipe('baseline', epochs=2, size=48, batch_size=8, limit=4, seed=5, workers=0)


@pytest.fixture(scope='module')
def trained(once, images) -> Run:
    """A run of two epochs; not to be changed by a test."""
    return Run.open(once('trained', lambda folder: train(RECIPE, images, folder)))


@pytest.fixture
def copied(trained, tmp_path) -> Run:
    return Run.open(Path(shutil.copytree(trained.path, tmp_path / 'copied')))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_resuming_a_finished_run_says_that_nothing_is_left_and_changes_nothing(copied, capsys):
    before = contents(copied.path)
    copied_journal = (copied / 'journal.jsonl').stat().st_mtime_ns
    assert main(['train', '--resume', str(copied.path)]) == 0
    output = capsys.readouterr().out
    assert 'trained for 2 epochs already, so nothing is left to do' in output
    assert f'cxr-fastai train --resume {copied.path} --epochs 4' in output
    assert main(['train', '--resume', str(copied.path), '--epochs', '2']) == 0
    assert contents(copied.path) == before
    assert (copied / 'journal.jsonl').stat().st_mtime_ns == copied_journal


def test_a_finished_run_needs_no_images_to_be_left_as_it_is(copied, tmp_path):
    copied.log_event('end', data=str(tmp_path / 'gone'))
    assert train(copied.recipe, tmp_path / 'gone', copied.path, resume=True) == copied


def test_a_finished_run_without_its_model_file_gets_it_again(copied, images):
    (copied / 'learner.pkl').unlink()
    train(copied.recipe, images, copied.path, resume=True)
    assert (copied / 'learner.pkl').is_file() and len(copied.history) == 2


def test_a_run_is_trained_longer_by_a_further_phase_that_its_folder_records(copied, capsys):
    assert main(['train', '--resume', str(copied.path), '--epochs', '3', '--lr', '0.0002']) == 0
    first = Phase('train', 2, 1e-3)
    assert copied.recipe == replace(RECIPE, phases=(first, Phase('extension', 1, 2e-4)))
    assert copied.history[['phase', 'epoch', 'lr']].values.tolist() == [
        ['train', 1, 1e-3],
        ['train', 2, 1e-3],
        ['extension', 3, 2e-4],
    ]
    resume = copied.last_event('resume')
    assert resume['added'] == [{'name': 'extension', 'epochs': 1, 'lr': 2e-4, 'frozen': False, 'patience': None}]
    assert copied.last_event('end')['epochs'] == 3 and copied.kept_epoch in (1, 2, 3)
    again = extend_recipe(copied, 5)
    assert again.phases[2:] == (Phase('extension-2', 2, 2e-4),)
    assert command_line(again) == 'cxr-fastai train --data DIR --recipe recipe.json'


@pytest.mark.parametrize(
    ('frozen', 'trained'),
    [(True, 'only the head, as before: the body stays frozen'), (False, 'the whole network')],
)
def test_the_log_says_whether_the_body_stays_frozen(images, tmp_path, caplog, frozen, trained):
    recipe = replace(RECIPE, phases=(Phase('train', 1, 1e-3, frozen),))
    run = train(recipe, images, tmp_path / 'run')
    caplog.set_level('INFO', 'cxr_fastai')
    train(extend_recipe(run, 2), images, run.path, resume=True)
    assert f'1 epoch of extension at learning rate 0.001, training {trained}' in caplog.messages


def test_metrics_of_the_shorter_training_are_refused(copied, images):
    evaluate(copied, images)
    train(extend_recipe(copied, 3), images, copied.path, resume=True)
    with pytest.raises(UsageError, match='metrics of test .*Run `cxr-fastai evaluate'):
        _ = copied.metrics
    evaluate(copied, images)
    assert copied.metrics


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'epochs': 1}, '--epochs 1: .* was trained for 2 epochs already, and epochs cannot be undone'),
        ({'epochs': 2, 'lr': 1e-4}, '--lr 0.0001: with --resume it is the learning rate of further epochs'),
        ({'epochs': 3, 'lr': -1.0}, 'the phase extension has 1 epoch at the learning rate -1'),
        ({'epochs': 2, 'patience': 3}, '--patience 3: with --resume it is the patience of further epochs, and'),
        ({'epochs': 3, 'patience': -1}, 'patience -1: a number from 0 to 1000 is needed'),
    ],
)
def test_what_would_not_train_longer_is_refused(trained, options, message):
    with pytest.raises(UsageError, match=message):
        extend_recipe(trained, **options)


def test_the_schedule_of_an_interrupted_run_is_not_shortened_but_extended(images, tmp_path):
    run = train(replace(RECIPE, phases=(Phase('train', 1, 1e-3),)), images, tmp_path / 'run')
    extended = extend_recipe(run, 4)
    run.extend(extended)  # as if it had been stopped before the first epoch of the new phase
    run.log_event('resume', data=str(images))
    with pytest.raises(UsageError, match='is made for 4 epochs, of which 1 is trained, and cannot be shortened'):
        extend_recipe(run, 2)
    assert extend_recipe(run, 4) == extended
    assert [phase.epochs for phase in extend_recipe(run, 6).phases] == [1, 3, 2]


def test_a_run_without_a_state_cannot_be_trained_longer(copied):
    (copied / 'state.pt').unlink()
    with pytest.raises(UsageError, match=r'it has no state.pt to continue from. Train with another --out'):
        extend_recipe(copied, 5)


def test_other_settings_are_refused_with_more_epochs_too(copied, images):
    other = replace(extend_recipe(copied, 3), seed=6)
    with pytest.raises(UsageError, match=r'trained with other settings or images \(seed: 5, now 6'):
        train(other, images, copied.path, resume=True)
    changed = replace(RECIPE, phases=(Phase('train', 2, 1e-4), Phase('extension', 1, 1e-4)))
    with pytest.raises(UsageError, match='phases: 2 epochs of train at .* 0.001, now 2 .* at .* 0.0001 and 1'):
        train(changed, images, copied.path, resume=True)
    assert copied.recipe == RECIPE
