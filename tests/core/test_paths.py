"""A path as another system or program writes it means the existing file."""

import os
import unicodedata
from pathlib import Path

import pytest

from cxr_fastai.core.paths import correct_path, correct_paths, is_windows_path

COMPOSED = unicodedata.normalize('NFC', 'Müller é/Ängström.png')
DECOMPOSED = unicodedata.normalize('NFD', COMPOSED)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ('train/NORMAL/a b.png', '#1.png', "'quoted'.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b'image')
    return tmp_path


@pytest.mark.parametrize(
    'name',
    [
        'train/NORMAL/a b.png',
        'train\\NORMAL\\a b.png',
        '.\\train\\NORMAL\\a b.png',
        '"train/NORMAL/a b.png"',
        "'train\\NORMAL\\a b.png'",
        '  train/NORMAL/a b.png ',
    ],
)
def test_quotes_spaces_and_backslashes_are_understood(folder, name):
    [corrected] = correct_paths(folder, [name])
    assert (folder / corrected).samefile(folder / 'train/NORMAL/a b.png')


@pytest.mark.parametrize(('stored', 'named'), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_composed_and_decomposed_letters_are_the_same(tmp_path, stored, named):
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).write_bytes(b'image')
    assert correct_paths(tmp_path, [named, stored]) == [stored, stored]
    assert correct_paths(tmp_path, [named.replace('/', '\\')]) == [stored]
    assert correct_path(tmp_path / named) == tmp_path / stored


def test_a_folder_in_one_form_and_a_file_in_the_other_are_found(tmp_path):
    folder = unicodedata.normalize('NFD', 'é')
    (tmp_path / folder).mkdir()
    (tmp_path / folder / unicodedata.normalize('NFC', 'ü.png')).write_bytes(b'image')
    [corrected] = correct_paths(tmp_path, [unicodedata.normalize('NFC', 'é/') + unicodedata.normalize('NFD', 'ü.png')])
    assert (tmp_path / corrected).is_file()


def test_names_in_another_encoding_are_found(tmp_path):
    (tmp_path / 'é.png').write_bytes(b'image')
    assert correct_paths(tmp_path, [os.fsdecode(b'\xe9.png')]) == ['é.png']


@pytest.mark.parametrize('name', ['#1.png', "'quoted'.png", 'gone.png', 'gone\\x.png', '', 'x' * 300, 'a\0b', '"'])
def test_existing_and_unknown_names_stay_as_they_are(folder, name):
    assert correct_paths(folder, [name]) == [name]


def test_a_file_with_a_backslash_comes_before_a_file_in_a_folder(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in ('a/b.png', 'a\\b.png'):
        (tmp_path / name).write_bytes(b'image')
    assert correct_paths(tmp_path, ['a\\b.png']) == ['a\\b.png']


@pytest.mark.parametrize(
    'path', ['C:\\data\\x.png', 'c:/x.png', '\\\\server\\share\\x.png', '/tmp/C:\\x.png', '"C:\\x"']
)
def test_paths_of_windows_are_recognised(path):
    assert is_windows_path(path)


@pytest.mark.parametrize('path', ['/tmp/x.png', 'a\\b.png', 'note: x.png', 'abc:\\x', ''])
def test_other_paths_are_not_those_of_windows(path):
    assert not is_windows_path(path)
