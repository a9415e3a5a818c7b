"""The exception tree and its exit codes."""

import importlib
import pickle
import pkgutil
import re

import pytest

import cxr_fastai
from cxr_fastai.core import errors
from cxr_fastai.core.errors import CXRError, ImageError, Stopped, first_line, visible


def exceptions() -> list[type[CXRError]]:
    """Return every subclass of `CXRError` in the package, after importing all its modules."""
    for module in pkgutil.walk_packages(cxr_fastai.__path__, 'cxr_fastai.'):
        if not module.name.endswith('__main__'):
            importlib.import_module(module.name)
    classes = [CXRError]
    for parent in classes:
        classes += parent.__subclasses__()
    return [error for error in classes if error.__module__.startswith('cxr_fastai.')]


def test_the_drawn_tree_names_every_exception_with_its_exit_code():
    drawn = dict(re.findall(r'^    [ │├└─]*(\w+) +(\d+)', errors.__doc__, re.MULTILINE))
    found = {error.__name__: str(error.exit_code) for error in exceptions()}
    assert drawn == found | {'Stopped': '128'}


def test_a_stopped_training_exits_with_128_plus_the_signal():
    assert Stopped(2).exit_code == 130
    assert Stopped(15).exit_code == 143


def test_an_image_error_keeps_its_message_and_code_when_a_worker_returns_it():
    error = pickle.loads(pickle.dumps(ImageError('a.png: E_EMPTY: the file is empty', 'E_EMPTY')))
    assert (str(error), error.code) == ('a.png: E_EMPTY: the file is empty', 'E_EMPTY')


@pytest.mark.parametrize(('code', 'status'), [('E_BLANK', 'rejected'), ('E_TRUNCATED', 'error')])
def test_an_intact_file_without_a_usable_image_is_rejected_and_a_damaged_one_is_an_error(code, status):
    assert ImageError('why', code).status == status


def test_the_first_line_of_an_error_without_a_message_is_its_class():
    assert first_line(ValueError('one\ntwo')) == 'one'
    assert first_line(ValueError('one'), 2) == 'on'
    assert first_line(ValueError()) == 'ValueError'


def test_file_names_cannot_command_the_terminal():
    assert visible('a\x1b[2Jb\n\u202ec\udcff é') == r'a\x1b[2Jb\n\u202ec\udcff é'
