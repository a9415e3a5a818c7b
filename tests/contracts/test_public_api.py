"""Each room has a small public API that is loaded when it is used."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import cxr_fastai.all

ROOMS = (
    'core',
    'images',
    'models',
    'inference',
    'data',
    'training',
    'evaluation',
    'interpretation',
    'publishing',
    'serving',
)


@pytest.mark.parametrize('room', ROOMS)
def test_every_public_name_of_a_room_is_there_and_documented(room):
    module = import_module(f'cxr_fastai.{room}')
    assert module.__doc__ and module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        assert not callable(thing) or thing.__doc__, f'{name} has no docstring'


def test_only_the_command_line_uses_typer_and_rich():
    package = Path(cxr_fastai.all.__file__).parent
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob('*.py')
        if re.search(r'^\s*(import|from) (typer|rich)\b', path.read_text(), re.MULTILINE)
    }
    assert users == {'cli'}


@pytest.mark.parametrize('room', ROOMS)
def test_no_public_name_is_also_the_name_of_a_file(room):
    """Importing the file would put the module in the place of the function."""
    module = import_module(f'cxr_fastai.{room}')
    files = {path.stem for path in Path(module.__file__).parent.glob('*.py')}
    assert files.isdisjoint(module.__all__)


def test_the_rooms_load_nothing_heavy_until_a_name_is_used():
    code = (
        f'import sys; from importlib import import_module\nfor room in {ROOMS}: import_module(f"cxr_fastai.{{room}}")\n'
        'print(*{"torch", "fastai", "pandas", "numpy", "matplotlib", "PIL", "fastapi"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_star_import_of_notebooks_has_a_sorted_list():
    assert cxr_fastai.all.__all__ == sorted(cxr_fastai.all.__all__)
    assert all(hasattr(cxr_fastai.all, name) for name in cxr_fastai.all.__all__)


def test_load_learner_is_the_only_name_that_means_something_else_in_fastai():
    """docs/from_fastai.md says so, and which one counts."""
    import fastai.vision.all as fastai_names

    names = [name for name in cxr_fastai.all.__all__ if hasattr(fastai_names, name)]
    assert [name for name in names if getattr(fastai_names, name) is not getattr(cxr_fastai.all, name)] == [
        'load_learner'
    ]


@pytest.mark.parametrize(
    ('imports', 'module'),
    [
        ('from fastai.vision.all import *; from cxr_fastai.all import *', 'cxr_fastai.training.restoring'),
        ('from cxr_fastai.all import *; from fastai.vision.all import *', 'fastai.learner'),
        (
            'from cxr_fastai.all import *; from fastai.vision.all import *; '
            'from cxr_fastai.training import load_learner',
            'cxr_fastai.training.restoring',
        ),
    ],
)
def test_the_last_import_of_load_learner_counts(imports, module):
    names: dict[str, object] = {}
    exec(imports, names)
    assert names['load_learner'].__module__ == module
