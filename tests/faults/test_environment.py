"""Commands in an environment that is damaged, or meant for another program."""

import os
import subprocess
import sys

import pytest

ARCHS = [sys.executable, '-P', '-m', 'cxr_fastai', 'archs']


def test_ranks_that_another_program_left_over_do_not_silence_a_command():
    done = subprocess.run(ARCHS, env=os.environ | {'RANK': '1', 'WORLD_SIZE': 'abc'}, capture_output=True, text=True)
    assert done.returncode == 0
    assert 'baseline' in done.stdout


@pytest.mark.parametrize('columns', ['0', '1', '99999999999'])
def test_an_impossible_width_of_the_terminal_is_ignored(columns):
    done = subprocess.run([*ARCHS, '--help'], env=os.environ | {'COLUMNS': columns}, capture_output=True, text=True)
    assert done.returncode == 0
    assert 'List networks' in done.stdout or 'Usage' in done.stdout
    assert len(done.stdout) < 20_000


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has /dev/full')
@pytest.mark.parametrize('option', [[], ['--help']])
def test_output_to_a_full_disk_has_the_exit_code_of_a_full_disk(option):
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*ARCHS, *option], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 6
    assert done.stderr.splitlines() == ['error: system: No space left on device']


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a POSIX shell')
@pytest.mark.parametrize('closed', ['>&-', '<&-', '<&- >&- 2>&-'])
def test_closed_standard_streams_cause_no_error(closed):
    done = subprocess.run(['sh', '-c', f'"$@" {closed}', 'sh', *ARCHS], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='only Linux has /dev/full')
def test_an_error_that_cannot_be_printed_keeps_its_exit_code():
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*ARCHS[:-1], 'evaluate', 'no-such-run'], stderr=full)
    assert done.returncode == 2
