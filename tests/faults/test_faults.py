"""Whatever stops a training, it goes on bit by bit, and no file is left half written."""

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

import faults
import pandas as pd
import pytest
import torch
from faults import add_tiny, equal, full_disk, outcome, poisoned, quietly, start, train_argv
from matplotlib.figure import Figure

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.recipe import Phase
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.inference.pickles import load_learner
from cxr_fastai.models.architectures import ARCHS, make_recipe
from cxr_fastai.training import checkpoint, training
from cxr_fastai.training.checkpoint import PREVIOUS, StopOnSignal, load_state, save_state
from cxr_fastai.training.training import train

SMALL = {'size': 48, 'limit': 8, 'batch_size': 4, 'seed': 3}
BATCHES = 4
"""Training batches in an epoch: 16 images."""
RECIPES = {
    'two phases, plateau': (
        'reference',
        {
            'phases': (Phase('frozen', 1, 1e-3, True), Phase('fine-tune', 3, 0.3)),
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
def tiny():
    add_tiny()
    yield
    del ARCHS['tiny']


class Crash(BaseException):
    """What no handler expects."""


def crashing_at(event: str, nth: int, order: float = StopOnSignal.order) -> type:
    """A callback that ends training at the nth `event`, as abruptly as can be within a process."""

    class CrashAt(StopOnSignal):
        left = nth

        def __call__(self, name):
            self.left -= name == event
            if not self.left and name == event:
                raise Crash
            return super().__call__(name)

    CrashAt.order = order
    return CrashAt


def recipe_of(name: str):
    base, fields = RECIPES[name]
    return dataclasses.replace(make_recipe('tiny', base, **SMALL), **fields)


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The runs that nothing stopped, by the name of their recipe."""
    folder = tmp_path_factory.mktemp('whole')
    return {name: train(recipe_of(name), images, folder / str(i)) for i, name in enumerate(RECIPES)}


def same(run: Run, other: Run) -> bool:
    """Whether weights, best and averaged weights, optimiser, history and the model file's answers are the same."""
    a, b = (load_learner(it / 'learner.pkl').model.eval() for it in (run, other))
    images = torch.rand(4, 3, 48, 48)
    return equal(outcome(run.path), outcome(other.path)) and torch.equal(a(images), b(images))


def stopped(monkeypatch, recipe, images: Path, out: Path, *where) -> Run:
    with monkeypatch.context() as patch:
        patch.setattr(training, 'StopOnSignal', crashing_at(*where))
        with pytest.raises(Crash):
            train(recipe, images, out)
    return Run.open(out)


WHERE = {
    'the first batch': lambda r: ('before_step', 1),
    'the middle of an epoch': lambda r: ('before_step', BATCHES + 2),
    'validation': lambda r: ('before_validate', 2),
    'after an epoch, before its state': lambda r: ('after_epoch', 2, 59),
    'after an epoch': lambda r: ('after_epoch', 1),
    'the end of a phase': lambda r: ('after_fit', 1),
    'the start of the last phase': lambda r: ('before_fit', len(r.phases), 59),
    'the last epoch': lambda r: ('before_step', r.epochs * BATCHES),
    'before the model file': lambda r: ('after_fit', len(r.phases)),
}


ONCE_MORE = {
    'tuned': ('the first batch', 'validation', 'after an epoch', 'the last epoch'),
    'mixup': ('before the model file',),
}
"""What another recipe shows already, stopped at the same place."""
CASES = [
    *(('two phases, plateau', where) for where in WHERE),
    ('tuned', 'the middle of an epoch'),
    ('tuned', 'after an epoch, before its state'),
    ('tuned', 'before the model file'),
    ('two cycles', 'the middle of an epoch'),
    ('two cycles', 'the end of a phase'),
    ('mixup', 'the middle of an epoch'),
    *(pytest.param(name, where, marks=pytest.mark.slow) for name in ONCE_MORE for where in ONCE_MORE[name]),
]


@pytest.mark.parametrize(('name', 'where'), CASES)
def test_a_training_that_stopped_goes_on_to_the_same_bits(images, tmp_path, monkeypatch, whole, name, where):
    recipe = recipe_of(name)
    run = stopped(monkeypatch, recipe, images, tmp_path / 'run', *WHERE[where](recipe))
    train(recipe, images, run.path, resume=True)
    assert same(run, whole[name])


def test_the_recipes_of_these_tests_do_what_they_are_for(whole):
    rates = whole['two phases, plateau'].history.query('phase == "fine-tune"').lr
    assert rates.iloc[-1] < rates.iloc[0] and 'average_weights' in load_state(whole['tuned'])


def test_two_stops_cost_no_more_than_their_epochs(images, tmp_path, monkeypatch, whole):
    recipe = recipe_of('two phases, plateau')
    run = stopped(monkeypatch, recipe, images, tmp_path / 'run', 'before_step', BATCHES + 1)
    steps = []
    with monkeypatch.context() as patch:
        second = crashing_at('before_step', 2 * BATCHES + 1)
        second.after_step = lambda self: steps.append(1)
        patch.setattr(training, 'StopOnSignal', second)
        with pytest.raises(Crash):
            train(recipe, images, run.path, resume=True)
        counting = type('Counting', (StopOnSignal,), {'after_step': lambda self: steps.append(1)})
        patch.setattr(training, 'StopOnSignal', counting)
        train(recipe, images, run.path, resume=True)
    assert len(steps) == (recipe.epochs - 1) * BATCHES and same(run, whole['two phases, plateau'])


def test_a_run_that_ended_may_be_resumed_and_stays_as_it_is(images, tmp_path, whole):
    run = Run(Path(shutil.copytree(whole['tuned'].path, tmp_path / 'run')))
    train(run.recipe, images, run.path, resume=True)
    assert same(run, whole['tuned']) and not (run / PREVIOUS).exists()


@pytest.fixture(scope='module')
def third_epoch(images, tmp_path_factory) -> Run:
    """A run that stopped in its third epoch."""
    with pytest.MonkeyPatch.context() as patch:
        return stopped(
            patch, recipe_of('tuned'), images, tmp_path_factory.mktemp('third') / 'run', 'before_step', 2 * BATCHES + 1
        )


@pytest.fixture
def begun(third_epoch, tmp_path) -> Run:
    """A copy of it."""
    return Run.open(Path(shutil.copytree(third_epoch.path, tmp_path / 'begun')))


def test_a_state_loads_without_running_code_and_knows_what_it_is_of(begun, images):
    state = torch.load(begun / 'state.pt', weights_only=True)
    assert state['identity'] == checkpoint.identify(begun.recipe, read_items(images, limit=8)) and state['epochs'] == 2


@pytest.mark.parametrize(
    'damage', [lambda data: b'', lambda data: data[: len(data) // 2], lambda data: b'x' + data[1:]]
)
def test_a_damaged_state_falls_back_on_the_one_before(begun, images, damage, whole):
    (begun / 'state.pt').write_bytes(damage((begun / 'state.pt').read_bytes()))
    assert load_state(begun)['epochs'] == 1
    train(begun.recipe, images, begun.path, resume=True)
    assert same(begun, whole['tuned'])


def test_a_run_without_its_state_is_not_trained_over(begun, images):
    for name in ('state.pt', PREVIOUS):
        (begun / name).unlink()
    before = (begun / 'history.csv').read_bytes()
    with pytest.raises(UsageError, match='has no state.pt to go on from: train into another --out'):
        train(begun.recipe, images, begun.path, resume=True)
    assert (begun / 'history.csv').read_bytes() == before


def test_the_good_state_outlives_a_save_that_is_interrupted_after_a_fallback(begun, monkeypatch):
    (begun / 'state.pt').write_bytes(b'x')
    state, calls, replace = load_state(begun), iter(range(9)), os.replace

    def interrupted(*paths):
        if next(calls):
            raise Crash
        replace(*paths)

    with monkeypatch.context() as patch, pytest.raises((Crash, FileNotFoundError)):
        patch.setattr(checkpoint.os, 'replace', interrupted)
        save_state(begun, state)
        save_state(begun, state)
    assert equal(load_state(begun), state)


def test_a_folder_that_is_no_run_is_refused_and_not_made(images, tmp_path):
    with pytest.raises(UsageError, match='not a run folder'):
        train(recipe_of('tuned'), images, tmp_path / 'typo', resume=True)
    assert not (tmp_path / 'typo').exists()


def test_a_resumed_run_is_compiled_and_tracked_as_it_was_begun(begun, images, monkeypatch):
    begun.note('start', data=str(images), compiled=True, track='tensorboard', unreadable=[])
    seen = {}
    monkeypatch.setattr(training, 'train', lambda *_, **given: seen.update(given))
    assert quietly(['train', '--resume', str(begun.path)])[0] == 0
    assert (seen['compile'], seen['track'], seen['resume']) == ('on', 'tensorboard', True)
    assert quietly(['train', '--resume', str(begun.path), '--compile', 'off'])[0] == 0 and seen['compile'] == 'off'


def test_other_circumstances_are_told(begun, images):
    begun.note('resume', data=str(images), compiled=False, threads=77, unreadable=[])
    with pytest.warns(UserWarning, match='begun otherwise .threads: 77, now 1.'):
        train(begun.recipe, images, begun.path, resume=True)


def test_images_that_were_skipped_stay_skipped(begun, images, whole):
    skipped = begun.items.path[begun.items.split == 'train'].iloc[0]
    begun.note('resume', data=str(images), unreadable=[skipped])
    train(begun.recipe, images, begun.path, resume=True)
    assert begun.noted('resume')['unreadable'] == [skipped] and not same(begun, whole['tuned'])


def test_a_run_that_moved_to_other_images_is_measured_there(begun, images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / 'elsewhere'))
    train(begun.recipe, other, begun.path, resume=True)
    assert begun.images == other.resolve()


def test_two_damaged_states_are_told(begun, images):
    for name in ('state.pt', PREVIOUS):
        (begun / name).write_bytes(b'x')
    with pytest.raises(CXRError, match='state.pt: damaged, so there is nothing to resume: train again'):
        train(begun.recipe, images, begun.path, resume=True)


@pytest.mark.parametrize('nth', [1, 2])
@pytest.mark.parametrize('refuses', [Crash(), OSError(28, 'No space left on device')])
def test_a_save_that_is_interrupted_at_a_rename_leaves_a_state(begun, monkeypatch, nth, refuses):
    replace, count = os.replace, iter(range(1, 9))

    def interrupted(*paths):
        if next(count) == nth:
            raise refuses
        replace(*paths)

    state = load_state(begun)
    monkeypatch.setattr(checkpoint.os, 'replace', interrupted)
    with pytest.raises((Crash, CXRError)):
        save_state(begun, state | {'epochs': 9})
    monkeypatch.undo()
    assert equal(load_state(begun), state) and not list(begun.path.glob('.*.tmp'))
    save_state(begun, state | {'epochs': 9})
    assert load_state(begun)['epochs'] == 9


def test_a_disk_that_is_full_only_when_synced_keeps_the_state(begun, monkeypatch):
    state, before = load_state(begun), (begun / 'state.pt').read_bytes()

    def full(_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch, pytest.raises(CXRError, match='state.pt: cannot be written .No space left'):
        patch.setattr(os, 'fsync', full)
        save_state(begun, state | {'epochs': 9})
    assert (begun / 'state.pt').read_bytes() == before


def test_what_a_killed_process_left_half_written_is_swept_away(begun, images):
    for name in ('.state.pt.123.tmp', '.learner.pkl.9.tmp', '.predictions.csv.7.tmp'):
        (begun / name).write_bytes(b'half')
    train(begun.recipe, images, begun.path, resume=True)
    assert [path.name for path in begun.path.glob('.*.tmp')] == ['.predictions.csv.7.tmp']  # `evaluate` may be at work


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'seed': 4}, 'seed: 3, now 4'),
        ({'ema': 0.0, 'clip': 2.0}, 'clip: 1.0, now 2.0; ema: 0.99, now 0.0'),
        ({'phases': (Phase('train', 3, 1e-3),)}, 'phases: 3 epochs of train at 0.003, now 3 epochs of train at 0.001'),
    ],
)
def test_another_recipe_is_refused_and_every_difference_named(begun, images, changes, named):
    with pytest.raises(UsageError, match=rf'was trained otherwise \(.*{named}\): resume it as it was'):
        train(dataclasses.replace(begun.recipe, **changes), images, begun.path, resume=True)


def test_more_workers_are_no_other_recipe(begun, images):
    train(dataclasses.replace(begun.recipe, workers=1), images, begun.path, resume=True)


def test_other_images_are_refused_and_counted(begun, images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / 'images'))
    (other / begun.items.path[0]).unlink()
    with pytest.raises(UsageError, match=r'\(images: 1 gone, 0 new, 0 with another label'):
        train(begun.recipe, other, begun.path, resume=True)


def test_images_that_changed_sides_are_counted(begun, images):
    now = read_items(images, limit=8)
    now.loc[now.index[now.split == 'train'][0], 'split'] = 'valid'
    counted = checkpoint._compare_items(begun.items, now)
    assert counted == '0 gone, 0 new, 1 with another label, split or patient'


def test_other_classes_are_refused(begun, images, monkeypatch):
    monkeypatch.setattr(checkpoint, 'VOCAB', ('NORMAL', 'COVID'))
    with pytest.raises(UsageError, match=r"classes: \['NORMAL', 'PNEUMONIA'\], now \['NORMAL', 'COVID'\]"):
        train(begun.recipe, images, begun.path, resume=True)


def test_a_run_without_its_first_journal_line_can_say_where_its_images_are(begun, images, whole):
    (begun / 'journal.jsonl').unlink()
    assert quietly(['train', '--resume', str(begun.path), '--data', str(images)])[0] == 0
    assert same(begun, whole['tuned'])


def test_a_torn_journal_takes_and_gives_further_lines(begun):
    journal = begun / 'journal.jsonl'
    journal.write_bytes(journal.read_bytes() + b'{"time": "2026-01-01", "event": "st')
    begun.note('stop', signal='SIGINT')
    assert begun.noted('stop')['signal'] == 'SIGINT' and begun.noted('start')['data']


@pytest.fixture(scope='module')
def three_epochs(images, tmp_path_factory) -> Run:
    """A training of three epochs through the command line."""
    folder = tmp_path_factory.mktemp('three') / 'run'
    assert quietly(train_argv(images, folder, epochs=3))[0] == 0
    return Run.open(folder)


@pytest.mark.parametrize('batch', [BATCHES + 1, BATCHES + 2, 2 * BATCHES])
def test_a_loss_that_is_no_number_keeps_the_last_good_state(images, tmp_path, three_epochs, batch):
    argv = train_argv(images, tmp_path / 'run', epochs=3)
    with poisoned(batch):
        code, told = quietly(argv)
    assert code == 6 and len(told.splitlines()) == 1 and 'nan in epoch 2' in told
    run = Run.open(tmp_path / 'run')
    failure = json.loads((run / 'failure.json').read_text())
    assert (failure['epoch'], failure['batch'], failure['best_epoch']) == (2, batch - BATCHES, 1)
    assert load_state(run)['epochs'] == 1 and (run / 'learner.pkl').is_file()
    assert quietly(['train', '--resume', str(run.path)])[0] == 0
    assert same(run, three_epochs) and not (run / 'failure.json').exists()


@pytest.mark.parametrize('name', faults.TRAINED)
def test_a_full_disk_spares_every_file_of_a_training(images, tmp_path, name):
    assert faults.fill_one(tmp_path, images, name, 60)


def draw_nothing_but(name: str, monkeypatch, draw=Figure.savefig) -> None:
    """Spare the time that the other pictures take."""

    def savefig(figure: Figure, path: Path, **how) -> None:
        if name in str(path):
            draw(figure, path, **how)
        else:
            path.write_bytes(b'a picture')

    monkeypatch.setattr(Figure, 'savefig', savefig)


def test_a_full_disk_spares_every_file_of_an_evaluation(images, tmp_path, monkeypatch, run):
    rows = [('clean', 0), ('noise', 1), ('noise', 2), ('shortcut', 0)]
    table = pd.DataFrame(rows, columns=['corruption', 'strength']).assign(n=2, auc=0.5, auc_low=0.4, auc_high=0.6)
    monkeypatch.setattr('cxr_fastai.evaluation.robustness.measure_robustness', lambda *_, **__: table)
    monkeypatch.setattr('cxr_fastai.cli.output.robustness_table', lambda _: '')
    done = Path(shutil.copytree(run.path, tmp_path / 'run'))
    argv = ['evaluate', str(done), '--data', str(images), '--robustness']
    assert quietly(argv)[0] == 0
    for name in faults.EVALUATED:
        path = next(done.rglob(name))
        before = path.read_bytes()
        draw_nothing_but(name, monkeypatch)
        with full_disk(name, 60):
            code, told = quietly(argv)
        assert code == 6 and path.read_bytes() == before and f'{name}: cannot be written (File too large)' in told
        assert len(told.splitlines()) == 1 and not list(done.rglob('*.tmp'))


# Processes: forked from one that has imported everything, but with a group, signals and exit codes of their own.


def wait_for(path: Path, holding: bytes = b'') -> None:
    deadline = time.monotonic() + 60
    while not (path.is_file() and holding in path.read_bytes()):
        assert time.monotonic() < deadline, f'{path} never came'
        time.sleep(0.005)


def alone() -> None:
    """Fork workers, as a command of its own does; others would import everything anew in every epoch."""
    add_tiny()
    multiprocessing.set_start_method('fork', force=True)


@pytest.fixture
def launch(tmp_path):
    """Start a command; what it prints is in `log`. Nothing survives the test."""
    started = []

    def launched(argv, before=alone):
        started.append(start([str(word) for word in argv], tmp_path / 'log', before))
        return started[-1]

    yield launched
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(10)


def errors(tmp_path) -> list[str]:
    return [line for line in (tmp_path / 'log').read_text().splitlines() if line.startswith('error: ')]


def ended(process) -> int | None:
    """The exit code, None where the process is still there after a minute. (How fast it ends, `benchmarks/faults.py`
    tells.)"""
    process.join(timeout=60)
    return process.exitcode


LONG = {'epochs': 500}


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_in_order(launch, images, tmp_path, number, code):
    process = launch(train_argv(images, tmp_path / 'run', **LONG))
    wait_for(tmp_path / 'run/history.csv')
    os.kill(process.pid, number)
    assert ended(process) == code
    (told,) = errors(tmp_path)
    assert f'stopped by {number.name}: `cxr-fastai train --resume {tmp_path}/run` goes on' in told
    assert 'Traceback' not in (tmp_path / 'log').read_text()
    assert (
        Run.open(tmp_path / 'run').noted('stop')['signal'] == number.name
        and load_state(Run(tmp_path / 'run'))['epochs']
    )


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_spares_nobody_a_traceback(launch, images, tmp_path, number, code):
    process = launch([*train_argv(images, tmp_path / 'run', **LONG), '--workers', '2'])
    wait_for(tmp_path / 'run/history.csv')
    os.killpg(process.pid, number)
    assert ended(process) == code
    assert 'Traceback' not in (tmp_path / 'log').read_text() and len(errors(tmp_path)) == 1


def test_a_killed_training_frees_its_folder_and_goes_on(launch, images, tmp_path):
    process = launch([*train_argv(images, tmp_path / 'run', epochs=3), '--workers', '1'])
    wait_for(tmp_path / 'run/history.csv')
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert quietly(['train', '--resume', str(tmp_path / 'run'), '--workers', '0'])[0] == 0
    assert len(Run.open(tmp_path / 'run').history) == 3


def test_a_second_process_on_a_run_is_refused(launch, images, tmp_path):
    process = launch(train_argv(images, tmp_path / 'run', **LONG))
    wait_for(tmp_path / 'run/state.pt')
    code, told = quietly(['train', '--resume', str(tmp_path / 'run')])
    assert code == 2 and 'another process trains there' in told and process.is_alive()
    assert quietly(train_argv(images, tmp_path / 'run'))[0] == 2


def check_for_ever() -> None:
    """Let the check of the images, before training, take its time."""
    add_tiny()

    def check(_):
        print('checking', flush=True)
        time.sleep(60)

    training.find_unreadable = check


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_batch_is_one_line_and_leaves_no_folder(launch, images, tmp_path, number, code):
    process = launch(train_argv(images, tmp_path / 'run'), before=check_for_ever)
    wait_for(tmp_path / 'log', b'checking')
    os.kill(process.pid, number)
    assert ended(process) == code
    assert errors(tmp_path) == [f'error: stopped by {number.name}'] and not (tmp_path / 'run').exists()
    assert 'Traceback' not in (tmp_path / 'log').read_text()


def test_ctrl_c_ends_other_commands_with_one_line(monkeypatch, images):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr('cxr_fastai.data.items.read_items', interrupted)
    assert quietly(['data', 'prepare', str(images)]) == (130, 'error: stopped by SIGINT')


def test_signals_are_as_before_after_a_command(images):
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    with redirect_stdout(io.StringIO()):
        quietly(['--version'])
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before
