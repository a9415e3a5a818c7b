"""`--quiet` and `--verbose`, before or after the name of a command."""

import logging

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.progress import progress_bar


@pytest.mark.parametrize(
    'line', ['--quiet recipes', 'recipes --quiet', '--quiet data demo', 'data --quiet demo', 'data demo --quiet']
)
def test_quiet_prints_nothing_where_nothing_is_wrong(line, capsys, tmp_path):
    argv = line.split()
    if 'demo' in argv:
        argv += [str(tmp_path / 'images'), '--images', '24', '--size', '64']
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ''
    assert main(['recipes']) == 0
    assert 'reference' in capsys.readouterr().out


def test_quiet_prints_errors_and_warnings(capsys, run, tmp_path):
    bad = tmp_path / 'bad.jpeg'
    bad.write_bytes(b'')
    assert main(['predict', str(run.path), str(bad), '--quiet']) == 3
    printed = capsys.readouterr()
    assert printed.out == ''
    assert f'error: {bad}: E_EMPTY' in printed.err and 'warning: ' in printed.err


def test_quiet_keeps_the_document_of_json(capsys):
    assert main(['--quiet', 'checks', '--json']) == 0
    assert capsys.readouterr().out.startswith('{')


def test_no_bar_is_drawn_if_only_warnings_are_logged(terminal, caplog):
    with terminal.used():
        assert not progress_bar(10).disable
        caplog.set_level(logging.WARNING, 'cxr_fastai')
        assert progress_bar(10).disable


@pytest.mark.parametrize('before', [True, False])
def test_verbose_prints_the_debug_log_to_stderr(before, capsys, run, images):
    image = next((images / 'test/NORMAL').iterdir())
    command = ['predict', str(run.path), str(image)]
    assert main(['--verbose', *command] if before else [*command, '--verbose']) == 0
    printed = capsys.readouterr()
    assert f'debug: {run.path}: loaded into ' in printed.err and 'debug: ' not in printed.out
    assert main(command) == 0
    assert 'debug: ' not in capsys.readouterr().err


def test_verbose_prints_the_traceback_of_an_error(capsys, tmp_path):
    assert main(['evaluate', str(tmp_path), '--verbose']) == 2
    assert 'Traceback' in capsys.readouterr().err
    assert main(['evaluate', str(tmp_path)]) == 2
    assert 'Traceback' not in capsys.readouterr().err


def test_quiet_and_verbose_contradict_each_other(fails):
    fails(['--quiet', 'recipes', '--verbose'], 2, '--quiet and --verbose contradict each other. Give only one')


@pytest.mark.parametrize('command', [[], ['train'], ['data'], ['data', 'audit']], ids=' '.join)
def test_the_help_documents_both(command, capsys):
    assert main([*command, '--help']) == 0
    text = capsys.readouterr().out
    assert '--quiet' in text and '--verbose' in text
