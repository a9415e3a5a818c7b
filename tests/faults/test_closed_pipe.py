"""A reader of the output that goes, such as `head`, does not end the command."""

import subprocess
import sys

import pytest

from cxr_fastai.core.run import Run


def start_piped(*words: object, stderr: int) -> subprocess.Popen[str]:
    argv = [sys.executable, '-m', 'cxr_fastai', *map(str, words)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_training_is_completed_after_its_reader_has_gone(images, tmp_path):
    out = tmp_path / 'run'
    words = f'--out {out} --epochs 2 --size 48 --batch-size 8 --limit 8 --workers 0'.split()
    with start_piped('train', '--data', images, *words, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline().startswith('train: 8 NORMAL')
        process.stdout.close()
    assert process.returncode == 0
    run = Run.open(out)
    assert len(run.history) == 2 and run.last_event('end') and (out / 'learner.pkl').is_file()


@pytest.mark.parametrize('words', [('archs',), ('recipes',)])
def test_a_list_whose_reader_has_gone_causes_no_traceback(words):
    with start_piped(*words, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == ''
    assert process.returncode == 0
