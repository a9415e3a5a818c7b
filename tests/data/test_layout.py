"""Every command that reads a data set knows the same spellings of splits and classes."""

from pathlib import Path

import pytest

from cxr_fastai.cli import main
from cxr_fastai.data.layout import read_class, read_kind, read_split
from cxr_fastai.data.loaders import CXRDataLoaders

SPELLINGS = {'train': 'Training', 'val': 'VALIDATION', 'test': 'Test'}


@pytest.fixture
def renamed(images, tmp_path) -> Path:
    """The images of the fixture `images` under other spellings, with folders of the kinds of pneumonia."""
    for split, name in SPELLINGS.items():
        for file in (images / split).glob('*/*.jpeg'):
            kind = 'VIRUS' if 'virus' in file.name else 'BACTERIA'
            folder = 'Normal' if file.parent.name == 'NORMAL' else f'pneumonia/{kind}'
            link = tmp_path / 'images' / name / folder / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.write_bytes(file.read_bytes())
    return tmp_path / 'images'


def test_every_command_reads_other_spellings(renamed, tmp_path, capsys):
    data = str(renamed)
    small = ['--epochs', '1', '--size', '48', '--limit', '3', '--workers', '0']
    assert main(['train', '--data', data, '--out', str(tmp_path / 'run'), *small]) == 0
    assert main(['evaluate', str(tmp_path / 'run'), '--data', data, '--limit', '3']) == 0
    assert main(['data', 'audit', data, '--out', str(tmp_path / 'audit')]) == 0
    assert main(['data', 'prepare', data, '--size', '48']) == 0
    assert 'left out' not in capsys.readouterr().err


def test_loaders_read_other_spellings(renamed):
    dls = CXRDataLoaders.from_folder(renamed, valid='official', size=48, bs=4, num_workers=0, limit=20)
    assert set(dls.item_table.split) == {'train', 'valid', 'test'}
    assert set(dls.item_table.kind) >= {'normal', 'virus'}


@pytest.mark.parametrize('name', ['tests', 'training set', '', 'dev', 7, None])
def test_other_names_are_no_split_or_class(name):
    assert read_split(name) is None
    assert read_class(name) is None


def test_a_kind_is_a_word_in_the_name_of_a_folder():
    assert read_kind('Viral Pneumonia') == 'virus'
    assert read_kind('antiviral') is None
    assert read_kind('bacteria-virus') is None
