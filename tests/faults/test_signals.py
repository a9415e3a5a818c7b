"""SIGINT and SIGTERM end a training with one line; a killed training can be resumed.

The commands run in processes with a group, signals and exit codes of their own, forked from a process that has imported
everything. `benchmarks/faults.py` measures how fast they end.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from faults import add_tiny, run_quietly, start, train_argv

from cxr_fastai.core.run import Run
from cxr_fastai.data import items
from cxr_fastai.training import training
from cxr_fastai.training.checkpoint import load_state

MANY_EPOCHS = 500
SIGINT = (signal.SIGINT, 130)
SIGTERM = (signal.SIGTERM, 143)


def slow(case: tuple) -> object:
    """The signal whose sibling shows the same in `make test`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def prepare_process() -> None:
    """Make workers forks of the process, as in a command; the forkserver would start them with all imports."""
    add_tiny()
    multiprocessing.set_start_method('fork', force=True)


@pytest.fixture
def launch(tmp_path):
    """A function that starts a command, which ends with the test; its output goes to the file `log`."""
    processes = []

    def launch_command(argv, before=prepare_process):
        process = start([str(word) for word in argv], tmp_path / 'log', before)
        processes.append(process)
        return process

    yield launch_command
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(10)


def wait_for(path: Path, content: bytes = b'') -> None:
    """Wait until the file `path` exists and has the `content`."""
    deadline = time.monotonic() + 60
    while not (path.is_file() and content in path.read_bytes()):
        assert time.monotonic() < deadline, f'{path} was not written'
        time.sleep(0.005)


def exit_code(process) -> int | None:
    """The exit code of `process`; None if it still runs after a minute."""
    process.join(timeout=60)
    return process.exitcode


def error_lines(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith('error: ')]


@pytest.mark.parametrize(('number', 'code'), [SIGTERM, slow(SIGINT)])
def test_a_signal_ends_a_training_after_the_current_batch(launch, images, tmp_path, number, code):
    run = Run(tmp_path / 'run')
    process = launch(train_argv(images, run.path, epochs=MANY_EPOCHS))
    wait_for(run / 'history.csv')
    os.kill(process.pid, number)
    assert exit_code(process) == code
    (error,) = error_lines(tmp_path / 'log')
    assert error.endswith(
        f'stopped by {number.name}. Continue after the last complete epoch: `cxr-fastai train --resume {run.path}`.'
    )
    assert 'Traceback' not in (tmp_path / 'log').read_text()
    assert run.last_event('stop')['signal'] == number.name and load_state(run)['epochs']


@pytest.mark.parametrize(('number', 'code'), [SIGINT, slow(SIGTERM)])
def test_a_signal_to_the_whole_process_group_causes_no_traceback(launch, images, tmp_path, number, code):
    process = launch([*train_argv(images, tmp_path / 'run', epochs=MANY_EPOCHS), '--workers', '2'])
    wait_for(tmp_path / 'run/history.csv')
    os.killpg(process.pid, number)
    assert exit_code(process) == code
    assert 'Traceback' not in (tmp_path / 'log').read_text() and len(error_lines(tmp_path / 'log')) == 1


def test_a_killed_training_releases_its_folder_and_can_be_resumed(launch, images, tmp_path):
    add_tiny()
    process = launch([*train_argv(images, tmp_path / 'run', epochs=3), '--workers', '1'])
    wait_for(tmp_path / 'run/history.csv')
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert run_quietly(['train', '--resume', str(tmp_path / 'run'), '--workers', '0'])[0] == 0
    assert len(Run.open(tmp_path / 'run').history) == 3


def test_a_second_process_cannot_train_into_the_same_run(launch, images, tmp_path):
    add_tiny()
    process = launch(train_argv(images, tmp_path / 'run', epochs=MANY_EPOCHS))
    wait_for(tmp_path / 'run/state.pt')
    code, stderr = run_quietly(['train', '--resume', str(tmp_path / 'run')])
    assert code == 2 and 'another process trains there' in stderr and process.is_alive()
    assert run_quietly(train_argv(images, tmp_path / 'run'))[0] == 2


def check_images_slowly() -> None:
    """Make the check of the images before a training last a minute."""
    add_tiny()

    def check(*_):
        print('checking', flush=True)
        time.sleep(60)

    training.find_unreadable = check


INTERRUPTED_IMPORT = """
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == 'cxr_fastai.cli':
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(('number', 'code'), [SIGINT, slow(SIGTERM)])
def test_a_signal_before_the_first_batch_leaves_one_line_and_no_folder(launch, images, tmp_path, number, code):
    process = launch(train_argv(images, tmp_path / 'run'), before=check_images_slowly)
    wait_for(tmp_path / 'log', b'checking')
    os.kill(process.pid, number)
    assert exit_code(process) == code
    assert error_lines(tmp_path / 'log') == [f'error: stopped by {number.name}']
    assert not (tmp_path / 'run').exists() and 'Traceback' not in (tmp_path / 'log').read_text()


def test_ctrl_c_ends_other_commands_with_one_line(monkeypatch, images):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(items, 'read_items', interrupt)
    assert run_quietly(['data', 'prepare', str(images)]) == (130, 'error: stopped by SIGINT')


def test_ctrl_c_during_the_imports_ends_with_one_line(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(INTERRUPTED_IMPORT)
    command = [sys.executable, '-m', 'cxr_fastai', 'predict', 'bundle', 'image.png']
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(tmp_path), *sys.path])}
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (130, 'error: stopped by SIGINT\n')
