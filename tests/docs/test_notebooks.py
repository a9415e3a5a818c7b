"""The notebooks are notebooks of nbdev: its test and its clean pass, and their stored outputs are complete and clean.

`make test` runs the notebooks of `RUN_ALWAYS` on synthetic images. `make test-all` runs all of them, with the cells
that are marked `#| slow`, also on real images if the environment variable CXR_DATA names their folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from contextlib import chdir
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from fastcore.nbio import NbCell, nb_frontmatter, read_nb
from IPython.core.interactiveshell import InteractiveShell
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.test import test_nb as run_nbdev_test

from cxr_fastai.core.errors import CXRWarning

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'nbs'
COMPLETE_WORKFLOW = '09_kaggle'
"""The notebook that needs all real images and trains for several minutes."""
RUN_ALWAYS = ('index', '03_data')
WITHOUT_REFERENCE = ('index', COMPLETE_WORKFLOW)
"""The notebooks that use several rooms and document none."""
DIRECTIVES = {'hide', 'echo', 'eval', 'slow'}
NOTEBOOKS = {path.stem: read_nb(path) for path in sorted(FOLDER.glob('*.ipynb'))}
NAMES = list(NOTEBOOKS)
SHORT = [name for name in NAMES if name != COMPLETE_WORKFLOW]


def code_cells(name: str) -> list[NbCell]:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == 'code']


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
def restore_settings(monkeypatch):
    """Restore what a notebook or nbdev changes: settings of matplotlib, pandas, logging and warnings, and Ctrl-C.

    nbdev also makes its shell that of the process, which then displays every figure that a later test draws.
    """
    log = logging.getLogger('cxr_fastai')
    level, on_interrupt = log.level, signal.getsignal(signal.SIGINT)
    max_width = pd.get_option('display.max_colwidth')
    backend = matplotlib.get_backend()
    monkeypatch.setattr(sys, 'path', sys.path.copy())
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    monkeypatch.setattr(InteractiveShell, '_instance', InteractiveShell._instance)
    with matplotlib.rc_context():
        yield
    plt.switch_backend(backend)
    pd.set_option('display.max_colwidth', max_width)
    log.setLevel(level)
    signal.signal(signal.SIGINT, on_interrupt)


@pytest.fixture
def passes(example_folder, tmp_path, monkeypatch, restore_settings):
    """Return a function that says whether a copy of a notebook in a temporary project passes nbdev's test."""
    folder = tmp_path / 'nbs'
    folder.mkdir()
    (folder / 'example').symlink_to(example_folder)
    shutil.copy(FOLDER / 'showdoc.py', folder)
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    # Also restores the variables, which some notebooks change.
    monkeypatch.setenv('CXR_TRUST', str(example_folder / 'trust.json'))
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))

    def run_notebook(name: str, skip_flags: list[str]) -> bool:
        copy = folder / f'{name}.ipynb'
        copy.write_text((FOLDER / copy.name).read_text().replace('skip_exec: true', 'skip_exec: false'))
        passed, _ = run_nbdev_test(copy, skip_flags=skip_flags, profile=False, cell_timeout=None)
        return passed

    return run_notebook


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', RUN_ALWAYS)
def test_a_notebook_passes_the_test_of_nbdev(name, passes):
    assert passes(name, skip_flags=['slow'])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SHORT)
def test_a_notebook_with_its_slow_cells_passes_the_test_of_nbdev(name, passes):
    assert passes(name, skip_flags=[])


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_passes_the_test_of_nbdev_on_real_images(name, real_images, passes, monkeypatch):
    monkeypatch.setenv('CXR_DATA', str(real_images))
    assert passes(name, skip_flags=[])


@pytest.mark.filterwarnings('ignore:unclosed file')  # of nbdev
def test_nbdev_clean_changes_no_notebook(tmp_path):
    for path in FOLDER.glob('*.ipynb'):
        copy = Path(shutil.copy(path, tmp_path))
        with chdir(ROOT):
            nbdev_clean(str(copy))
        assert copy.read_bytes() == path.read_bytes(), f'{path.name}: run nbdev-clean'


def test_nbdev_export_changes_no_module_of_the_package(tmp_path):
    """The modules are written by hand. nbdev would write its own version and docstring into `__init__.py`."""
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    for folder in ('cxr_fastai', 'nbs'):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns('__pycache__', 'example'))
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    with chdir(tmp_path):
        nbdev_export()
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


@pytest.mark.parametrize('name', NAMES)
def test_the_front_matter_has_a_title_and_a_description(name):
    first = NOTEBOOKS[name].cells[0]
    front = nb_frontmatter(NOTEBOOKS[name])
    assert first.cell_type == 'markdown' and first.source.startswith(f'# {front["title"]}\n\n> {front["description"]}')
    assert front['description'].endswith('.')
    # nbdev drops the rest of this cell.
    assert set(front) <= {'title', 'description', 'skip_exec'}
    assert len(first.source.splitlines()) <= 5


@pytest.mark.parametrize('name', NAMES)
def test_every_directive_has_a_meaning(name):
    directives = {directive for cell in code_cells(name) for directive in cell.directives}
    assert directives <= DIRECTIVES
    assert 'hide' in directives
    assert not [cell.source for cell in code_cells(name) if re.search(r'^\s*#\s+\|', cell.source, re.M)]


@pytest.mark.parametrize('name', NAMES)
def test_imports_have_cells_of_their_own(name):
    """nbdev runs the cells with imports, and no others, to show documentation."""
    for cell in code_cells(name):
        lines = [line for line in cell.source.splitlines() if re.match(r'(import|from) ', line)]
        if lines and not cell.has_directive('hide'):
            code = [line for line in cell.source.splitlines() if re.match(r'[^\s#)]', line)]
            assert code == lines, cell.source


@pytest.mark.parametrize('name', [name for name in NAMES if name not in WITHOUT_REFERENCE])
def test_a_lesson_documents_functions_of_its_room(name):
    shown = [cell for cell in code_cells(name) if cell.source.startswith('show_doc(')]
    assert len(shown) >= 2
    for cell in shown:
        documented = re.fullmatch(r'show_doc\(([\w.]+)\)', cell.source)[1]
        text = ''.join(cell.outputs[0].data['text/markdown'])
        assert re.search(rf'^### {re.escape(documented)}\n\n```python\n(def|class) ', text, re.M), 'run nbs/execute.py'
        source = re.search(r'\[Source\]\((.+)\)$', text)[1]
        assert (FOLDER / source).is_file()


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NAMES if name not in WITHOUT_REFERENCE])
def test_the_stored_documentation_is_that_of_the_package(name, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from showdoc import Reference

    for cell in code_cells(name):
        if cell.source.startswith('show_doc('):
            documented = cell.source[len('show_doc(') : -1]
            current = Reference(find_public(documented))._repr_markdown_()
            assert ''.join(cell.outputs[0].data['text/markdown']) == current, f'run nbs/execute.py {name}'


def find_public(name: str) -> Any:
    """Return the public function, class or method `name`."""
    first = name.partition('.')[0]
    modules = [import_module(f'cxr_fastai.{room}') for room in ('all', 'data', 'models')]
    return attrgetter(name)(next(module for module in modules if hasattr(module, first)))


@pytest.mark.parametrize('name', NAMES)
def test_stored_outputs_contain_figures_and_no_errors_warnings_or_machine_paths(name):
    outputs = [output for cell in code_cells(name) for output in cell.outputs]
    text = json.dumps(outputs)
    assert 'image/png' in text, 'no figures are stored: run nbs/execute.py'
    assert not [output for output in outputs if output.output_type == 'error' or output.get('name') == 'stderr']
    assert 'Warning: ' not in text.replace(f'{CXRWarning.__name__}: ', '')
    assert not re.search(r'/(home|tmp|root|work|Users)/|\\x1b|\\u001b', text)


@pytest.mark.parametrize('name', NAMES)
def test_cells_that_run_store_what_they_return(name):
    """A cell whose last line is a value, such as a table, shows it."""
    for cell in code_cells(name):
        last = cell.source.rstrip().splitlines()[-1]
        if cell.directive('eval') != 'false' and re.fullmatch(r'[a-z_.\[\]]+', last):
            assert cell.outputs, f'run nbs/execute.py: {last}'


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_says_what_it_teaches_and_ends_with_exercises_or_next_steps(name):
    texts = [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == 'markdown']
    assert 'you will' in '\n'.join(texts[:2]).lower()
    assert re.match('## (Exercises|Next)', texts[-1]) and NOTEBOOKS[name].cells[-1].source == texts[-1]


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_checks_its_results_and_leaves_logic_to_the_package(name):
    sources = [cell.source for cell in code_cells(name)]
    assert any('assert ' in source for source in sources)
    assert not any(re.search(r'^(def |class |for .*:$)', source, re.M) for source in sources)


@pytest.mark.parametrize('name', NAMES)
def test_links_of_a_notebook_point_to_existing_files(name):
    texts = [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == 'markdown']
    links = re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', '\n'.join(texts))
    missing = [link for link in links if not (FOLDER / link).is_file()]
    assert not missing


def test_the_overview_goes_from_a_folder_to_activation_maps_in_ten_cells():
    cells = [cell.source for cell in NOTEBOOKS['index'].cells[:10]]
    code = '\n'.join(cell.source for cell in NOTEBOOKS['index'].cells[:10] if cell.cell_type == 'code')
    steps = ['CXRDataLoaders.from_folder', 'show_batch', 'cxr_learner', 'fine_tune', 'show_results']
    steps += ['CXRInterpretation.from_learner', 'plot_confusion_matrix', 'plot_top_losses']
    positions = [code.index(step) for step in steps]
    assert positions == sorted(positions)
    assert 'heatmap' in code[positions[-1] :]
    assert len(cells) == 10
