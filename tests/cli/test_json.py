"""With `--json` a command prints one JSON document with the documented fields to stdout, and nothing else there."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.cli.documents import print_json
from cxr_fastai.evaluation import figures
from cxr_fastai.inference.predictor import COLUMNS

PAGE = (Path(__file__).parents[2] / 'docs/scripts.md').read_text()


@pytest.fixture
def read(capsys) -> Callable[..., tuple[Any, str]]:
    """Runs a command with `--json`; returns the document and what was printed to stderr."""

    def run(*words: object, code: int = 0) -> tuple[Any, str]:
        capsys.readouterr()
        assert main([*map(str, words), '--json']) == code
        printed = capsys.readouterr()
        return json.loads(printed.out), printed.err

    return run


def documented(command: str) -> set[str]:
    """Return the fields in the first column of the table about `command` in the documentation."""
    section = PAGE.split(f'### {command}\n')[1].split('###')[0]
    return {
        name
        for line in section.splitlines()
        for name in re.findall('`(.+?)`', line.split('|')[1:2][0] if '|' in line else '')
    }


def test_predict_prints_the_rows_of_all_images(read, run, images, tmp_path):
    bad = tmp_path / 'bad [red].jpeg'
    bad.write_bytes(b'')
    document, messages = read('predict', run.path, images / 'test', bad, code=3)
    assert document.keys() == documented('predict')
    assert document['images'] == len(document['rows']) == 13
    assert document['failures'] == 1 and document['table'] is document['maps'] is document['page'] is None
    first, *_, last = document['rows']
    assert list(first) == list(COLUMNS)
    assert 0 <= first['p_pneumonia'] <= 1 and first['threshold'] == document['threshold']
    assert last['path'] == str(bad) and last['code'] == 'E_EMPTY' and last['p_pneumonia'] is None
    assert 'E_EMPTY' in messages and '13 images' in messages


def test_a_resumed_table_gives_the_same_document(read, run, images, tmp_path):
    command = ('predict', run.path, images / 'test/NORMAL', '--out', tmp_path / 'p.csv')
    new, _ = read(*command)
    resumed, _ = read(*command, '--resume')
    assert resumed == new and new['table'] == str(tmp_path / 'p.csv')


def test_evaluate_prints_the_metrics_of_each_run_and_their_comparison(read, run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, 'save_figures', lambda *_: ['figures/roc_test.png'])  # they take long
    first = shutil.copytree(run.path, tmp_path / 'first')
    second = shutil.copytree(run.path, tmp_path / 'second')
    document, _ = read('evaluate', first, '--data', images)
    assert document.keys() == documented('evaluate')
    assert document['comparison'] is None
    (evaluated,) = document['runs']
    assert evaluated['run'] == str(first) and evaluated['figures'] and evaluated['robustness'] is None
    assert evaluated['metrics'] == json.loads((first / 'metrics.json').read_text())['test']
    document, _ = read('evaluate', first, second, '--data', images, '--out', tmp_path / 'comparison')
    assert [row['run'] for row in document['runs']] == [str(first), str(second)]
    assert document['comparison'].keys() == {'folder', 'pairs', 'seeds'}
    assert document['comparison']['folder'] == str(tmp_path / 'comparison')


def test_audit_prints_the_contents_of_its_file(read, images, tmp_path):
    shutil.copytree(images, tmp_path / 'images')
    next((tmp_path / 'images/test/NORMAL').iterdir()).write_bytes(b'')
    document, _ = read('data', 'audit', tmp_path / 'images', '--out', tmp_path / 'audit', code=1)
    assert document.keys() == documented('data audit')
    assert document == json.loads((tmp_path / 'audit/audit.json').read_text())
    assert 'unusable images' in {finding['name'] for finding in document['findings']}


def test_an_error_is_no_document(capsys, tmp_path):
    assert main(['evaluate', str(tmp_path), '--json']) == 2
    printed = capsys.readouterr()
    assert printed.out == '' and printed.err.startswith('error: ')


def test_the_next_command_prints_to_stdout_again(read, capsys):
    read('checks')
    assert main(['checks']) == 0
    assert 'cores' in capsys.readouterr().out


def test_numbers_that_json_lacks_are_null(capsys):
    rows = pd.DataFrame({'auc': [0.5, math.nan]}).to_dict('records')
    print_json({'rows': rows, 'pair': (math.inf, 'ü[red]:smile:\udcff')})
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == {'rows': [{'auc': 0.5}, {'auc': None}], 'pair': [None, 'ü[red]:smile:\udcff']}
