"""Interrupted training resumes bit for bit, and a run is resumed only with its own recipe and images."""

import dataclasses
import io
import os
import shutil
import signal
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from faults import BATCHES, add_tiny, equal, outcome, run_quietly

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.recipe import Phase, Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.models.architectures import ARCHS, make_recipe
from cxr_fastai.training import checkpoint, training
from cxr_fastai.training.checkpoint import PREVIOUS_STATE, StopOnSignal, load_state, save_state
from cxr_fastai.training.extending import extend_recipe
from cxr_fastai.training.restoring import load_learner
from cxr_fastai.training.training import train

SETTINGS = {'size': 48, 'limit': 6, 'batch_size': 4, 'seed': 4, 'valid': 'official'}
RECIPES = {
    'two phases, plateau': (
        'reference',
        {
            'phases': (Phase('frozen', 1, 1e-3, True), Phase('fine-tune', 3, 0.1)),
            'plateau_patience': 0,
            'plateau_factor': 0.5,
        },
    ),
    'tuned': ('tuned', {'phases': (Phase('train', 3, 3e-3),), 'start_size': 0.5, 'clip': 1.0, 'body_lr': 0.5}),
    'two cycles': ('tuned', {'phases': (Phase('one', 2, 3e-3), Phase('two', 2, 1e-3)), 'start_size': 0.5}),
    'mixup': (
        'reference',
        {
            'phases': (Phase('train', 3, 1e-3),),
            'mixup': 0.4,
            'erase': 0.5,
            'label_smoothing': 0.1,
            'class_weights': True,
        },
    ),
}


@pytest.fixture(scope='module', autouse=True)
def tiny_architecture():
    add_tiny()
    yield
    del ARCHS['tiny']


class Crash(BaseException):
    """An exception that no handler expects."""


def crash_at(event: str, nth: int, order: float = StopOnSignal.order) -> type[StopOnSignal]:
    """A replacement of `StopOnSignal` that raises `Crash` at the nth `event`, after callbacks of a lower `order`."""

    class CrashAt(StopOnSignal):
        remaining = nth

        def __call__(self, event_name):
            if event_name == event:
                self.remaining -= 1
                if self.remaining == 0:
                    raise Crash
            return super().__call__(event_name)

    CrashAt.order = order
    return CrashAt


def recipe_of(name: str) -> Recipe:
    base, fields = RECIPES[name]
    return dataclasses.replace(make_recipe('tiny', base, **SETTINGS), **fields)


@pytest.fixture(scope='module')
def uninterrupted(once, images) -> dict[str, Run]:
    """A run of each recipe that was not interrupted; not to be changed by a test."""

    def train_all(folder: Path) -> None:
        folder.mkdir()
        for name in RECIPES:
            train(recipe_of(name), images, folder / name)

    folder = once('uninterrupted', train_all)
    return {name: Run.open(folder / name) for name in RECIPES}


def same(run: Run, other: Run) -> bool:
    """True if states, histories, exported weights and predictions of two runs are equal."""
    networks = [load_learner(trained / 'learner.pkl').model.eval() for trained in (run, other)]
    batch = torch.rand(4, 3, 48, 48)
    return equal(outcome(run.path), outcome(other.path)) and torch.equal(networks[0](batch), networks[1](batch))


def interrupt(monkeypatch, recipe: Recipe, images: Path, out: Path, *where) -> Run:
    """Train until a `Crash` at `where`, the arguments of `crash_at`, and return the interrupted run."""
    with monkeypatch.context() as patch:
        patch.setattr(training, 'StopOnSignal', crash_at(*where))
        with pytest.raises(Crash):
            train(recipe, images, out)
    return Run.open(out)


def moment(name: str, recipe: Recipe) -> tuple:
    """The arguments of `crash_at` for the moment `name` of a training by `recipe`."""
    before_checkpoint = 59
    moments = {
        'first batch': ('before_step', 1),
        'middle of an epoch': ('before_step', BATCHES + 2),
        'validation': ('before_validate', 2),
        'after an epoch, before its checkpoint': ('after_epoch', 2, before_checkpoint),
        'after an epoch': ('after_epoch', 1),
        'end of a phase': ('after_fit', 1),
        'start of the last phase': ('before_fit', len(recipe.phases), before_checkpoint),
        'last epoch': ('before_step', recipe.epochs * BATCHES),
        'before the model is saved': ('after_fit', len(recipe.phases)),
    }
    return moments[name]


def slow(name: str, moment_name: str):
    """A case that needs a training of its own, although others cover the recipe and the moment."""
    return pytest.param(name, moment_name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ('name', 'moment_name'),
    [
        ('two phases, plateau', 'first batch'),
        ('two phases, plateau', 'middle of an epoch'),
        ('two phases, plateau', 'end of a phase'),
        ('tuned', 'validation'),
        ('tuned', 'after an epoch, before its checkpoint'),
        ('two cycles', 'start of the last phase'),
        ('two cycles', 'before the model is saved'),
        ('mixup', 'middle of an epoch'),
        slow('two phases, plateau', 'validation'),
        slow('two phases, plateau', 'after an epoch, before its checkpoint'),
        slow('two phases, plateau', 'after an epoch'),
        slow('two phases, plateau', 'start of the last phase'),
        slow('two phases, plateau', 'last epoch'),
        slow('two phases, plateau', 'before the model is saved'),
        slow('tuned', 'first batch'),
        slow('tuned', 'middle of an epoch'),
        slow('tuned', 'after an epoch'),
        slow('tuned', 'last epoch'),
        slow('tuned', 'before the model is saved'),
        slow('two cycles', 'middle of an epoch'),
        slow('two cycles', 'end of a phase'),
        slow('mixup', 'before the model is saved'),
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    images, tmp_path, monkeypatch, uninterrupted, name, moment_name
):
    recipe = recipe_of(name)
    run = interrupt(monkeypatch, recipe, images, tmp_path / 'run', *moment(moment_name, recipe))
    train(recipe, images, run.path, resume=True)
    assert same(run, uninterrupted[name])


def test_the_recipes_of_these_tests_reduce_the_rate_and_average_weights(uninterrupted):
    rates = uninterrupted['two phases, plateau'].history.query('phase == "fine-tune"').lr
    assert rates.iloc[-1] < rates.iloc[0]
    assert 'average_weights' in load_state(uninterrupted['tuned'])


def test_each_interruption_costs_one_epoch_at_most(images, tmp_path, monkeypatch, uninterrupted):
    recipe = recipe_of('two phases, plateau')
    run = interrupt(monkeypatch, recipe, images, tmp_path / 'run', 'before_step', BATCHES + 1)
    steps = []
    with monkeypatch.context() as patch:
        crash_later = crash_at('before_step', 2 * BATCHES + 1)
        crash_later.after_step = lambda self: steps.append(1)
        patch.setattr(training, 'StopOnSignal', crash_later)
        with pytest.raises(Crash):
            train(recipe, images, run.path, resume=True)
        count_steps = type('CountSteps', (StopOnSignal,), {'after_step': lambda self: steps.append(1)})
        patch.setattr(training, 'StopOnSignal', count_steps)
        train(recipe, images, run.path, resume=True)
    assert len(steps) == (recipe.epochs - 1) * BATCHES
    assert same(run, uninterrupted['two phases, plateau'])


def test_resuming_a_completed_run_that_lost_its_model_restores_it(images, tmp_path, uninterrupted):
    run = Run(Path(shutil.copytree(uninterrupted['tuned'].path, tmp_path / 'run')))
    (run / 'model.safetensors').unlink()
    train(run.recipe, images, run.path, resume=True)
    assert same(run, uninterrupted['tuned'])
    assert not (run / PREVIOUS_STATE).exists()


@pytest.fixture(scope='module')
def longer(once, images, uninterrupted) -> dict[str, Run]:
    """A training by each of two recipes with a further phase, all in one go; not to be changed by a test."""

    def train_all(folder: Path) -> None:
        folder.mkdir()
        for name in ('two phases, plateau', 'tuned'):
            train(extend_recipe(uninterrupted[name], recipe_of(name).epochs + 2), images, folder / name)

    folder = once('longer', train_all)
    return {path.name: Run.open(path) for path in folder.iterdir()}


@pytest.mark.parametrize('name', ['two phases, plateau', 'tuned'])
def test_a_run_that_is_trained_longer_equals_a_training_by_its_recipe_bit_for_bit(
    images, tmp_path, uninterrupted, longer, name
):
    run = Run(Path(shutil.copytree(uninterrupted[name].path, tmp_path / 'run')))
    train(extend_recipe(run, run.recipe.epochs + 2), images, run.path, resume=True)
    assert same(run, longer[name])


@pytest.mark.parametrize(
    'where',
    [
        ('before_step', 1),
        pytest.param(('before_step', BATCHES + 1), marks=pytest.mark.slow),
        ('after_fit', 2),  # the first fit has no epoch left
    ],
)
def test_an_interrupted_extension_resumes_bit_for_bit(images, tmp_path, monkeypatch, uninterrupted, longer, where):
    run = Run(Path(shutil.copytree(uninterrupted['tuned'].path, tmp_path / 'run')))
    with monkeypatch.context() as patch:
        patch.setattr(training, 'StopOnSignal', crash_at(*where))
        with pytest.raises(Crash):
            train(extend_recipe(run, run.recipe.epochs + 2), images, run.path, resume=True)
    assert not run.has_ended and run.recipe == longer['tuned'].recipe
    assert run_quietly(['train', '--resume', str(run.path)])[0] == 0
    assert same(run, longer['tuned'])


@pytest.fixture(scope='module')
def interrupted_in_epoch_3(once, images) -> Run:
    def train_until_epoch_3(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, recipe_of('tuned'), images, folder, 'before_step', 2 * BATCHES + 1)

    return Run.open(once('interrupted', train_until_epoch_3))


@pytest.fixture
def interrupted(interrupted_in_epoch_3, tmp_path) -> Run:
    """A copy of a run of the recipe `tuned` that was interrupted in its third and last epoch."""
    return Run.open(Path(shutil.copytree(interrupted_in_epoch_3.path, tmp_path / 'interrupted')))


def test_a_state_loads_without_running_code_and_identifies_its_run(interrupted, images):
    state = torch.load(interrupted / 'state.pt', weights_only=True)
    items = read_items(images, limit=SETTINGS['limit'])
    assert state['identity'] == checkpoint.identify(interrupted.recipe, items) and state['epochs'] == 2


DAMAGES = {
    'empty': lambda data: b'',
    'half': lambda data: data[: len(data) // 2],
    'first byte': lambda data: b'x' + data[1:],
}


def damage_state(run: Run, damage: str) -> None:
    path = run / 'state.pt'
    path.write_bytes(DAMAGES[damage](path.read_bytes()))


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_state_is_replaced_by_the_previous_one(interrupted, damage):
    damage_state(interrupted, damage)
    assert load_state(interrupted)['epochs'] == 1


@pytest.mark.parametrize(
    'damage', ['half', *(pytest.param(name, marks=pytest.mark.slow) for name in ('empty', 'first byte'))]
)
def test_a_run_with_a_damaged_state_resumes_from_the_previous_one(interrupted, images, uninterrupted, damage):
    damage_state(interrupted, damage)
    train(interrupted.recipe, images, interrupted.path, resume=True)
    assert same(interrupted, uninterrupted['tuned'])


def test_a_run_without_its_state_is_not_overwritten(interrupted, images):
    for name in ('state.pt', PREVIOUS_STATE):
        (interrupted / name).unlink()
    before = (interrupted / 'history.csv').read_bytes()
    with pytest.raises(UsageError, match='cannot be resumed: it has no state.pt. Train with another --out'):
        train(interrupted.recipe, images, interrupted.path, resume=True)
    assert (interrupted / 'history.csv').read_bytes() == before


def test_an_intact_state_survives_an_interrupted_save_after_a_damaged_one(interrupted, monkeypatch):
    (interrupted / 'state.pt').write_bytes(b'x')
    state = load_state(interrupted)
    replace_files = os.replace
    calls = []

    def replace_once(*paths):
        calls.append(paths)
        if len(calls) > 1:
            raise Crash
        replace_files(*paths)

    with monkeypatch.context() as patch, pytest.raises((Crash, FileNotFoundError)):
        patch.setattr(os, 'replace', replace_once)
        save_state(interrupted, state)
        save_state(interrupted, state)
    assert equal(load_state(interrupted), state)


def hostile_pickle() -> bytes:
    """A dictionary whose key is a tuple of itself twice, 64 times: hashing it takes 2**64 steps."""
    doubled = b''.join(b'q' + bytes([n]) + b'h' + bytes([n]) + b'\x86' for n in range(64))
    return b'\x80\x02})' + doubled + b'K\x01s.'


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_state_that_would_be_read_for_ever_or_grow_is_damaged(interrupted, compression):
    content = hostile_pickle() if compression == zipfile.ZIP_STORED else b'\x80\x02}.'
    for name in ('state.pt', PREVIOUS_STATE):
        with zipfile.ZipFile(interrupted / name, 'w', compression) as archive:
            archive.writestr('state/data.pkl', content)
            archive.writestr('state/version', '3')
    with pytest.raises(CXRError, match=r'state\.pt: the file is damaged'):
        load_state(interrupted)


def test_two_damaged_states_are_an_error(interrupted, images):
    for name in ('state.pt', PREVIOUS_STATE):
        (interrupted / name).write_bytes(b'x')
    with pytest.raises(CXRError, match='state.pt: the file is damaged, so the run cannot be resumed. Train again'):
        train(interrupted.recipe, images, interrupted.path, resume=True)


def test_a_folder_that_is_not_a_run_is_rejected_and_not_made(images, tmp_path):
    with pytest.raises(UsageError, match='no such run folder'):
        train(recipe_of('tuned'), images, tmp_path / 'typo', resume=True)
    assert not (tmp_path / 'typo').exists()


def test_a_resumed_run_is_compiled_and_tracked_as_before_unless_options_say_otherwise(interrupted, images, monkeypatch):
    interrupted.log_event('start', data=str(images), compiled=True, track='tensorboard', unreadable=[])
    arguments = {}
    monkeypatch.setattr(training, 'train', lambda *_, **options: arguments.update(options))
    argv = ['train', '--resume', str(interrupted.path)]
    assert run_quietly(argv)[0] == 0
    assert arguments == {'compile': 'on', 'track': 'tensorboard', 'resume': True, 'device': None}
    assert run_quietly([*argv, '--compile', 'off'])[0] == 0
    assert arguments['compile'] == 'off'


def test_a_resume_in_another_environment_warns(interrupted, images):
    interrupted.log_event('resume', data=str(images), compiled=False, threads=77, unreadable=[])
    with pytest.warns(UserWarning, match='started in another environment .threads: 77, now 1.'):
        train(interrupted.recipe, images, interrupted.path, resume=True)


def test_images_that_were_skipped_are_skipped_again(interrupted, images, uninterrupted):
    skipped = interrupted.items.path[interrupted.items.split == 'train'].iloc[0]
    interrupted.log_event('resume', data=str(images), unreadable=[skipped])
    train(interrupted.recipe, images, interrupted.path, resume=True)
    assert interrupted.last_event('resume')['unreadable'] == [skipped]
    assert not same(interrupted, uninterrupted['tuned'])


def test_a_run_records_the_new_folder_of_its_images(interrupted, images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / 'elsewhere'))
    train(interrupted.recipe, other, interrupted.path, resume=True)
    assert interrupted.images == other.resolve()


def test_partial_files_of_a_killed_training_are_removed(interrupted, images):
    own = f'.predictions.csv.{os.getpid()}.tmp'  # a process that runs may be writing it
    for name in ('.state.pt.4194305.tmp', '.learner.pkl.4194306.tmp', own):
        (interrupted / name).write_bytes(b'half')
    train(interrupted.recipe, images, interrupted.path, resume=True)
    assert [path.name for path in interrupted.path.glob('.*.tmp')] == [own]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'seed': 5}, 'seed: 4, now 5'),
        ({'ema': 0.0, 'clip': 2.0}, 'clip: 1.0, now 2.0; ema: 0.99, now 0.0'),
        (
            {'phases': (Phase('train', 3, 1e-3),)},
            'phases: 3 epochs of train at .* 0.003, now 3 .* at .* 0.001',
        ),
    ],
)
def test_another_recipe_is_rejected_with_all_differences(interrupted, images, changes, message):
    with pytest.raises(UsageError, match=rf'trained with other settings or images \(.*{message}\). Restore them'):
        train(dataclasses.replace(interrupted.recipe, **changes), images, interrupted.path, resume=True)


def test_another_number_of_workers_is_not_another_recipe(interrupted, images):
    train(dataclasses.replace(interrupted.recipe, workers=1), images, interrupted.path, resume=True)


def test_other_images_are_rejected_and_counted(interrupted, images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / 'images'))
    (other / interrupted.items.path[0]).unlink()
    with pytest.raises(UsageError, match=r'\(images: 1 removed, 0 added, 0 with another label'):
        train(interrupted.recipe, other, interrupted.path, resume=True)


def test_images_in_another_split_are_counted(interrupted, images, tmp_path):
    path = interrupted.items.path[interrupted.items.split == 'train'].iloc[0]
    table = read_items(images, limit=SETTINGS['limit'])
    table.loc[table.path == path, 'split'] = 'valid'
    compared = checkpoint._compare_items(interrupted.items, table)
    assert compared == '0 removed, 0 added, 1 with another label, split or patient'


def test_other_classes_are_rejected(interrupted, images, monkeypatch):
    monkeypatch.setattr(checkpoint, 'VOCAB', ('NORMAL', 'COVID'))
    with pytest.raises(UsageError, match=r"classes: \['NORMAL', 'PNEUMONIA'\], now \['NORMAL', 'COVID'\]"):
        train(interrupted.recipe, images, interrupted.path, resume=True)


def test_a_run_without_a_journal_resumes_with_images_from_the_command_line(interrupted, images, uninterrupted):
    (interrupted / 'journal.jsonl').unlink()
    assert run_quietly(['train', '--resume', str(interrupted.path), '--data', str(images)])[0] == 0
    assert same(interrupted, uninterrupted['tuned'])


def test_a_resumed_run_keeps_its_folder(interrupted, tmp_path):
    code, stderr = run_quietly(['train', '--resume', str(interrupted.path), '--out', str(tmp_path / 'new')])
    assert code == 2 and 'a resumed run keeps its folder. Omit --out.' in stderr


def test_a_journal_with_an_incomplete_line_remains_readable_and_writable(interrupted):
    journal = interrupted / 'journal.jsonl'
    journal.write_bytes(journal.read_bytes() + b'{"time": "2026-01-01", "event": "st')
    interrupted.log_event('stop', signal='SIGINT')
    assert interrupted.last_event('stop')['signal'] == 'SIGINT' and interrupted.last_event('start')['data']


def test_a_command_restores_the_signal_handlers():
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    with redirect_stdout(io.StringIO()):
        run_quietly(['--version'])
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before
