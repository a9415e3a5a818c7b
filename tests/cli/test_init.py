"""The command line as a whole: exit codes, error lines, signals, `--help`, `--version`, and the demo."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from cxr_fastai import cli
from cxr_fastai.cli import main
from cxr_fastai.data import items
from cxr_fastai.publishing import exporting


def test_help_loads_neither_torch_nor_pandas():
    code = (
        'import sys; from cxr_fastai.cli import main; '
        'codes = [main([*words.split(), "--help"]) for words in ("", "train", "data demo")]; '
        'print(codes, *{"torch", "fastai", "pandas", "numpy", "matplotlib"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '[0, 0, 0]'
    assert done.stdout.count('Usage') == 3


def test_version_prints_the_version_of_the_package(capsys):
    assert main(['--version', 'train']) == 0
    assert version('cxr_fastai') in capsys.readouterr().out


def test_python_dash_m_runs_the_command_line():
    command = [sys.executable, '-m', 'cxr_fastai', '--version']
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith('cxr_fastai ')


@pytest.mark.parametrize('name', ['train', 'evaluate', 'explain', 'predict', 'serve', 'data'])
def test_a_command_module_is_not_hidden_by_its_command(name):
    assert getattr(cli, name).__name__ == f'cxr_fastai.cli.{name}'


def test_missing_images_exit_with_one_and_say_how_to_get_some(fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fails(['train'], 1, 'data/chest_xray: no such folder.*--data DIR.*cxr-fastai data download.*data demo')
    fails(['train', '--data', 'nowhere'], 1, 'nowhere: no such folder')


def test_a_file_name_that_is_too_long_is_one_error_line(fails):
    fails(['train', '--data', 'x' * 300], 1, 'File name too long')


def test_a_full_disk_exits_with_six_and_leaves_no_learner(fails, train_argv, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
    try:
        fails([*train_argv, '--limit', '4'], 6, r'state.pt: cannot be written \(File too large\)')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list((tmp_path / 'run').glob('*learner.pkl*'))


@pytest.mark.skipif(not Path('/sys').is_dir(), reason='needs Linux: /sys refuses new files even to root')
def test_a_read_only_output_folder_exits_with_six(fails, train_argv, run, images):
    read_only = Path('/sys/cxr')
    fails([*train_argv[:4], read_only / 'run'], 6, '/sys/cxr/run: cannot be written')
    fails(['data', 'demo', read_only], 6, '/sys/cxr: cannot be written')
    image = next((images / 'test').rglob('*.jpeg'))
    fails(['predict', run.path, image, '--out', read_only.with_suffix('.csv')], 6, 'cannot be written')
    fails(['data', 'audit', images, '--out', read_only], 6, '/sys/cxr: cannot be written')
    fails(['lr-find', '--data', images, '--out', read_only.with_suffix('.png')], 6, '/sys: cannot be written')
    fails(['explain', run.path, image, '--out', read_only], 6, '/sys/cxr: cannot be written')


def test_a_bug_keeps_its_traceback(monkeypatch, images):
    def bug(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(items, 'data_root', bug)
    with pytest.raises(ZeroDivisionError):
        main(['train', '--data', str(images)])


@pytest.fixture
def foreground() -> Iterator[None]:
    """In the test, Ctrl-C interrupts this process, also if it was started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_one_error_line(fails, foreground, monkeypatch, images, number, code):
    def interrupt(*_):
        signal.raise_signal(number)

    monkeypatch.setattr(items, 'data_root', interrupt)
    fails(['data', 'audit', images], code, f'stopped by {number.name}')


def test_a_signal_counts_that_a_library_turns_into_another_error(fails, foreground, monkeypatch, images):
    def interrupt(*_):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError('Error calling __set_name__')  # as the creation of a class in Python 3.11

    monkeypatch.setattr(items, 'data_root', interrupt)
    fails(['data', 'audit', images], 130, 'stopped by SIGINT')


def test_a_command_in_the_background_ignores_ctrl_c(foreground, monkeypatch, images, tmp_path):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        return images

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(items, 'data_root', interrupt)
    assert main(['data', 'audit', '--out', str(tmp_path / 'audit')]) == 0


def test_the_demo_runs_every_stage(fails, tmp_path, monkeypatch, capsys):
    # tests/publishing tests it; it starts a process
    monkeypatch.setattr(exporting, 'verify_in_new_process', lambda _: None)
    folder = tmp_path / 'demo'
    assert main(['demo', '--out', str(folder), '--images', '40', '--size', '48', '--epochs', '1']) == 0
    assert '8 of 8: report' in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {'images', 'audit', 'run', 'bundle', 'predictions.csv'}
    assert (folder / 'run/metrics.json').is_file()
    fails(['demo', '--out', folder], 2, 'exists already')
