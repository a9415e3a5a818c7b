"""Tables, lists and settings of others: pipes and devices do not hang, formulas stay text, damage is one line."""

import os
import shutil

import pandas as pd
import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import escape_formula, unescape_formula, write_csv
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items

FORMULAS = ['=cmd|x', '+1', '-1', '@SUM(A1)', '\tx', '\rx', "'=x", "''=x", '\0=x']
PLAIN = ["'", "it's", 'a=b', 'x', '', "'x"]


@pytest.mark.parametrize('text', [*FORMULAS, *PLAIN])
def test_a_text_is_no_formula_in_a_table_and_is_read_back_unchanged(text):
    cell = escape_formula(text)
    assert not cell.startswith(('=', '+', '-', '@', '\t', '\r', '\0'))
    assert unescape_formula(cell) == text
    assert (cell == text) == (text in PLAIN)


def test_formulas_in_the_tables_of_a_run_are_escaped_and_read_back(tmp_path):
    run = Run(tmp_path)
    names = ['=cmd.jpeg', '+a.jpeg', '@b.jpeg', "'=c.jpeg", 'd.jpeg']
    table = pd.DataFrame({'path': names, 'label': 'NORMAL', 'split': 'test', 'patient': '-1', 'kind': 'normal'})
    write_csv(run / 'items.csv', table)
    lines = (run / 'items.csv').read_text().splitlines()[1:]
    assert all(line.startswith(("'", 'd')) and ",'-1," in line for line in lines)
    pd.testing.assert_frame_equal(run.items, table)


def test_formulas_in_a_list_of_images_are_the_files_that_they_name(images, tmp_path):
    for folder, name in (('NORMAL', '=1.jpeg'), ('PNEUMONIA', 'p.jpeg')):
        (tmp_path / folder).mkdir()
        shutil.copy(next((images / 'test' / folder).iterdir()), tmp_path / folder / name)
    os.rename(tmp_path / 'NORMAL/=1.jpeg', tmp_path / '=1.jpeg')
    listing = pd.DataFrame({'path': ['=1.jpeg', 'PNEUMONIA/p.jpeg'], 'label': ['NORMAL', 'PNEUMONIA']})
    write_csv(tmp_path / 'list.csv', listing)
    assert read_items(tmp_path / 'list.csv').path.to_list() == ['=1.jpeg', 'PNEUMONIA/p.jpeg']


@pytest.fixture(params=['pipe', 'device', 'socket folder'])
def odd_file(request, tmp_path):
    """A path that is not a regular file."""
    path = tmp_path / 'odd.csv'
    if request.param == 'pipe':
        os.mkfifo(path)
    elif request.param == 'device':
        path.symlink_to('/dev/zero')
    else:
        path.mkdir()
    return path


COMMANDS = {
    'a recipe': lambda path, bundle: ['train', '--recipe', path],
    'a list of images': lambda path, bundle: ['train', '--csv', path],
    'images': lambda path, bundle: ['predict', bundle, path, '--out', path.parent / 'table.csv'],
    'a model': lambda path, bundle: ['predict', path, path],
    'a token': lambda path, bundle: ['serve', bundle, '--token-file', path],
    'a run': lambda path, bundle: ['report', path],
    'a bundle': lambda path, bundle: ['serve', path],
    'a trusted file': lambda path, bundle: ['trust', path, '--sha256', '0' * 64],
}


@pytest.mark.parametrize('words', COMMANDS.values(), ids=COMMANDS)
def test_a_pipe_or_device_in_place_of_a_file_is_an_error_at_once(words, odd_file, bundle, capsys):
    code = main([str(word) for word in words(odd_file, bundle)])
    err = capsys.readouterr().err
    assert code in (1, 2, 3) and 'Traceback' not in err, err


@pytest.mark.parametrize(
    'content',
    [b'', b'[]', b'{"a": 1}', b'{"a": "DOG"}', b'{"a": "NORMAL", "a": null}', b'\xff', b'{"a": NaN}', b'[' * 100_000],
)
def test_a_damaged_mapping_of_classes_is_refused(content, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / 'images')
    (folder / 'classes.json').write_bytes(content)
    with pytest.raises(UsageError, match=r'classes\.json: '):
        read_items(folder)


def test_a_mapping_of_classes_that_is_a_pipe_is_refused(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / 'images')
    os.mkfifo(folder / 'classes.json')
    with pytest.raises(CXRError, match=r'classes\.json: a pipe'):
        read_items(folder)
