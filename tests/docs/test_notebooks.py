"""The notebooks run without errors on synthetic and on real images, and their stored outputs are complete and clean.

`make test` runs the notebooks of `RUN_ALWAYS` on synthetic images. `make test-all` runs all of them, also on real
images if the environment variable CXR_DATA names their folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'nbs'
COMPLETE_WORKFLOW = '09_kaggle'
"""The notebook that needs all real images and trains for several minutes."""
RUN_ALWAYS = ('index', '03_data')
NAMES = sorted(path.stem for path in FOLDER.glob('*.ipynb'))
SHORT = [name for name in NAMES if name != COMPLETE_WORKFLOW]
CELLS = {name: json.loads((FOLDER / f'{name}.ipynb').read_text())['cells'] for name in NAMES}


@pytest.fixture(scope='session')
def example_folder(tmp_path_factory) -> Path:
    """The folder of the example images and the example run, which are made once for all notebooks and workers."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent
    folder = base / 'notebooks'
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def log_level():
    """Restore the level of the package's logger, which some notebooks change."""
    log = logging.getLogger('cxr_fastai')
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def execute(example_folder, tmp_path, monkeypatch, log_level):
    """Return a function that runs a notebook in a temporary folder, and fails if one of its cells fails."""
    from execnb.shell import CaptureShell

    def run_notebook(name: str) -> None:
        monkeypatch.chdir(tmp_path)
        # Also restores the variable, which some notebooks change.
        monkeypatch.setenv('CXR_TRUST', str(example_folder / 'trust.json'))
        (tmp_path / 'example').symlink_to(example_folder)
        executed = tmp_path / 'executed.ipynb'
        CaptureShell(tmp_path).execute(FOLDER / f'{name}.ipynb', executed, exc_stop=True)
        assert '"output_type": "error"' not in executed.read_text()

    return run_notebook


def slow_unless_always(name: str):
    marks = [] if name in RUN_ALWAYS else [pytest.mark.slow]
    return pytest.param(name, marks=marks)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [slow_unless_always(name) for name in SHORT])
def test_a_notebook_runs_on_synthetic_images(name, execute):
    execute(name)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SHORT)
def test_a_notebook_runs_on_real_images(name, real_images, execute, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(real_images))
    execute(name)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings('ignore')
def test_the_complete_workflow_runs_on_all_real_images(real_images, execute, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(real_images))
    execute(COMPLETE_WORKFLOW)


@pytest.mark.parametrize('name', NAMES)
def test_stored_outputs_contain_figures_and_no_errors_or_machine_paths(name):
    code_cells = [cell for cell in CELLS[name] if cell['cell_type'] == 'code']
    outputs = json.dumps([cell['outputs'] for cell in code_cells])
    assert 'image/png' in outputs, 'no figures are stored: run nbs/execute.py'
    assert '"output_type": "error"' not in outputs
    assert not re.search(r'/(home|tmp|root|work|Users)/|\\x1b', outputs)


@pytest.mark.parametrize('name', NAMES)
def test_stored_cells_have_no_metadata_and_no_execution_counts(name):
    code_cells = [cell for cell in CELLS[name] if cell['cell_type'] == 'code']
    assert not any(cell['metadata'] or cell['execution_count'] for cell in code_cells), 'run nbs/execute.py'


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_starts_with_its_aim_and_ends_with_exercises_or_next_steps(name):
    first, last = [''.join(CELLS[name][index]['source']) for index in (0, -1)]
    assert first.startswith('# ')
    assert 'you will' in first.lower()
    assert re.match('## (Exercises|Next)', last)


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_checks_its_results_and_leaves_logic_to_the_package(name):
    sources = [''.join(cell['source']) for cell in CELLS[name] if cell['cell_type'] == 'code']
    assert any('assert ' in source for source in sources)
    assert not any(re.search(r'^(def |class |for .*:$)', source, re.M) for source in sources)


@pytest.mark.parametrize('name', NAMES)
def test_links_of_a_notebook_point_to_existing_files(name):
    texts = [''.join(cell['source']) for cell in CELLS[name] if cell['cell_type'] == 'markdown']
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', '\n'.join(texts))
    missing = [link for link in links if not (FOLDER / link).is_file()]
    assert not missing
