"""A folder is replaced as a whole, and what killed programs left is removed or put back."""

import os
import subprocess
import sys

import pytest

from cxr_fastai.core import folders
from cxr_fastai.core.folders import exchange, is_running, replaced_folder, sweep

NOBODY = 4_194_305
"""A number above that of every process of Linux."""


@pytest.fixture
def out(tmp_path):
    """A folder with one file."""
    (tmp_path / 'bundle').mkdir()
    (tmp_path / 'bundle' / 'file').write_text('old')
    return tmp_path / 'bundle'


@pytest.fixture(params=['exchange', 'two renames'])
def system(request, monkeypatch):
    """A system that can exchange two folders, and one that cannot."""
    if request.param == 'two renames':
        monkeypatch.setattr(folders, 'exchange', lambda first, second: False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced(out, system):
    with replaced_folder(out) as new:
        (new / 'file').write_text('new')
        assert (out / 'file').read_text() == 'old'
    assert (out / 'file').read_text() == 'new'
    assert names(out.parent) == ['bundle']


def test_a_new_folder_is_created(tmp_path):
    with replaced_folder(tmp_path / 'a' / 'b') as new:
        (new / 'file').write_text('new')
    assert (tmp_path / 'a/b/file').read_text() == 'new'


def test_an_error_leaves_the_old_folder(out, system):
    with pytest.raises(RuntimeError), replaced_folder(out) as new:
        (new / 'file').write_text('new')
        raise RuntimeError
    assert (out / 'file').read_text() == 'old' and names(out.parent) == ['bundle']


@pytest.mark.skipif(sys.platform != 'linux', reason='the file system of the tests is known on Linux')
def test_two_folders_are_exchanged_in_one_step(out, tmp_path):
    (tmp_path / 'other').mkdir()
    assert exchange(tmp_path / 'other', out)
    assert names(out) == [] and names(tmp_path / 'other') == ['file']
    assert not exchange(tmp_path / 'missing', out)


KILL = """
import os, sys
from pathlib import Path
from cxr_fastai.core import folders
if sys.argv[2] == 'two renames':
    folders.exchange = lambda first, second: False
replace, rmtree = os.replace, folders.shutil.rmtree
calls = []
def step(function, *args, **options):
    calls.append(1)
    if len(calls) > int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return function(*args, **options)
os.replace = lambda *args: step(replace, *args)
folders.shutil.rmtree = lambda *args, **options: step(rmtree, *args, **options)
with folders.replaced_folder(Path(sys.argv[1])) as new:
    (new / 'file').write_text('new')
"""


@pytest.mark.parametrize('n_steps', range(4))
@pytest.mark.parametrize('kind', ['exchange', 'two renames'])
def test_after_a_kill_the_next_start_finds_the_old_or_the_new_folder(kind, n_steps, out):
    command = [sys.executable, '-c', KILL, str(out), kind, str(n_steps)]
    subprocess.run(command, timeout=60)
    if kind == 'exchange':
        assert (out / 'file').read_text() in ('old', 'new')
    sweep(out)
    assert (out / 'file').read_text() in ('old', 'new')
    assert names(out.parent) == ['bundle']


def test_only_leftovers_of_ended_processes_are_removed(out):
    kept = ['.bundle.tmp', f'.bundle.{os.getpid()}.new', f'.bundle2.{NOBODY}.new', f'.bundle.{NOBODY}.txt', 'bundle']
    for name in (f'.bundle.{NOBODY}.tmp', *kept[:-1]):
        (out.parent / name).write_text('')
    (out.parent / f'.bundle.{NOBODY}.new').mkdir()
    (out.parent / f'.bundle.{NOBODY}.old').symlink_to(out)
    sweep(out)
    assert names(out.parent) == sorted(kept) and names(out) == ['file']


def test_running_processes_are_known():
    assert is_running(os.getpid()) and is_running(1)
    assert not is_running(NOBODY) and not is_running(10**9)
