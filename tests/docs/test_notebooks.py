"""The notebooks run from top to bottom, on synthetic images and, where CXR_DATA names them, on some of the real ones."""

import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / 'nbs').glob('*.ipynb'))
SHORT = [path for path in NOTEBOOKS if path.stem != '09_kaggle']
cells = {path: json.loads(path.read_text())['cells'] for path in NOTEBOOKS}


@pytest.fixture(scope='session')
def shared(tmp_path_factory) -> Path:
    """One folder for every notebook of every worker: the example images and run are made in it once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'notebooks'
    folder.mkdir(exist_ok=True)
    return folder


def execute(path: Path, shared: Path, tmp_path: Path, monkeypatch) -> None:
    """Run the notebook `path` in `tmp_path`, with the examples and a store of trust that all notebooks share."""
    from execnb.shell import CaptureShell

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CXR_TRUST', str(shared / 'trust.json'))  # also restores it: notebooks may set another
    (tmp_path / 'example').symlink_to(shared)
    CaptureShell(tmp_path).execute(path, tmp_path / 'run.ipynb', exc_stop=True)
    assert '"output_type": "error"' not in (tmp_path / 'run.ipynb').read_text()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', SHORT, ids=lambda path: path.stem)
def test_a_notebook_runs_on_synthetic_images(path, shared, tmp_path, monkeypatch):
    execute(path, shared, tmp_path, monkeypatch)


@pytest.mark.real
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('path', SHORT, ids=lambda path: path.stem)
def test_a_notebook_runs_on_real_images(path, real_images, shared, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(real_images))
    execute(path, shared, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings('ignore')
def test_the_whole_story_runs_on_all_real_images(real_images, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(real_images))
    execute(next(path for path in NOTEBOOKS if path not in SHORT), tmp_path, tmp_path, monkeypatch)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_shows_is_stored_and_names_no_machine(path):
    code = [cell for cell in cells[path] if cell['cell_type'] == 'code']
    outputs = json.dumps([cell['outputs'] for cell in code])
    assert 'image/png' in outputs, 'run nbs/execute.py'
    assert '"output_type": "error"' not in outputs
    assert not any(cell['metadata'] or cell['execution_count'] for cell in code), 'clean it: nbs/execute.py does'
    assert not re.search(r'/(home|tmp|root|work|Users)/|\\x1b', outputs)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_its_aim_asserts_and_ends_with_what_comes_next(path):
    first, last = (''.join(cells[path][i]['source']) for i in (0, -1))
    assert first.startswith('# ') and 'you will' in first.lower()
    assert re.match('## (Exercises|Next)', last)
    source = [''.join(cell['source']) for cell in cells[path] if cell['cell_type'] == 'code']
    assert any('assert ' in text for text in source)
    assert not any(re.search('^(def|class|for .*:$)', text, re.M) for text in source), 'logic belongs in a module'
