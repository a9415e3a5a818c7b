"""The commands `cache list` and `cache clean`."""

import io
import re
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from cxr_fastai.cli import main
from cxr_fastai.core.environment import is_installed
from cxr_fastai.images.cache_folders import list_caches


class Answer(io.StringIO):
    """What a user types in a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_bundles(tmp_path, monkeypatch) -> None:
    """No test meets bundles of the Hugging Face Hub in the user's own cache."""
    if is_installed('huggingface_hub'):
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))


@pytest.fixture
def names(images, tmp_path, monkeypatch, capsys) -> list[str]:
    """The names of two caches of 60 images in a cache folder that has other files too."""
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'cache'))
    for size in ('48', '64'):
        assert main(['data', 'prepare', str(images), '--size', size]) == 0
    foreign = tmp_path / 'cache/foreign/folder'
    foreign.mkdir(parents=True)
    (foreign / 'precious.txt').write_text('precious')
    capsys.readouterr()
    return [cache.name for cache in list_caches()]


def test_list_shows_size_images_and_time(names, capsys):
    assert main(['cache', 'list']) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ['size', 'images', 'last', 'change', 'name']
    assert [row.split()[-1] for row in rows] == names and names[0].endswith('/48-squish')
    assert all(re.match(r'0\.\d MB +60 +\d{4}-\d\d-\d\d \d\d:\d\d ', row) for row in rows)
    assert re.match(r'0\.\d MB in ', total)


def test_an_empty_cache_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CXR_CACHE', str(tmp_path / 'none'))
    assert main(['cache', 'list']) == 0
    assert capsys.readouterr().out == f'{tmp_path / "none"}: no caches\n'


def test_clean_deletes_the_named_cache_only(names, capsys):
    assert main(['cache', 'clean', names[0], '--yes']) == 0
    assert 'deleted: 1 cache, 0.' in capsys.readouterr().out
    assert [cache.name for cache in list_caches()] == names[1:]


def test_clean_all_leaves_other_files(names, tmp_path):
    note = list_caches()[0].path / 'note.txt'
    note.write_text('mine')
    assert main(['cache', 'clean', '--all', '--yes']) == 0
    assert list_caches() == []
    left = {path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file()}
    assert left == {'note.txt', 'precious.txt'}
    assert main(['cache', 'clean', '--all']) == 0


def test_a_link_to_a_cache_is_not_followed(names, tmp_path):
    (cache, _) = list_caches()
    moved = cache.path.rename(tmp_path / 'moved')
    cache.path.symlink_to(moved)
    assert [cache.name for cache in list_caches()] == names[1:]
    assert main(['cache', 'clean', '--all', '--yes']) == 0
    assert (moved / 'images.u8').is_file()


def test_clean_asks_first(names, monkeypatch, fails):
    fails(['cache', 'clean', '--all'], 2, r'Delete 2 caches, 0\.\d MB\? Nobody can answer here: give --yes')
    monkeypatch.setattr(sys, 'stdin', Answer('n\n'))
    assert main(['cache', 'clean', '--all']) == 1
    assert len(list_caches()) == 2
    monkeypatch.setattr(sys, 'stdin', Answer('y\n'))
    assert main(['cache', 'clean', '--all']) == 0
    assert list_caches() == []


@pytest.mark.parametrize('words', [[], ['name', '--all']])
def test_clean_takes_names_or_all(words, names, fails):
    fails(['cache', 'clean', *words], 2, 'give either names of caches or --all')


@pytest.mark.parametrize('name', ['gone/48-squish', '..', '../images', 'foreign/folder'])
def test_clean_deletes_nothing_that_is_no_cache(name, names, tmp_path, fails):
    fails(['cache', 'clean', names[0], name, '--yes'], 2, f'{re.escape(name)}: no such cache')
    assert len(list_caches()) == 2 and (tmp_path / 'cache/foreign/folder/precious.txt').exists()


def test_clean_refuses_a_cache_that_is_being_prepared(names, fails):
    folder: Path = list_caches()[0].path
    with FileLock(folder / 'lock'):
        fails(['cache', 'clean', '--all', '--yes'], 1, '`data prepare` is at work there')
