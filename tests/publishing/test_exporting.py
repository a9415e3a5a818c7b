"""Export: a bundle replaces an older one only when it is complete and verified."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from bundlefiles import change_tensors, seal
from safetensors.numpy import load

from cxr_fastai.cli import main
from cxr_fastai.core import folders
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import read_items
from cxr_fastai.data.loaders import CXRDataLoaders
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.inference.bundle import SELFTEST, Bundle
from cxr_fastai.inference.config import ModelConfig
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.inference.selftest import ParityError
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.publishing import exporting
from cxr_fastai.publishing.exporting import check_destination, export, verify, verify_in_new_process
from cxr_fastai.training.learner import recipe_learner


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    """A copy of the bundle, the only file in its folder."""
    return Path(shutil.copytree(bundle, tmp_path / 'b'))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail(*_: object) -> None:
    raise ParityError('no')


def do_nothing(*_: object) -> None:
    pass


@pytest.mark.parametrize(
    'faults',
    [{'write_files': fail}, {'write_files': do_nothing, 'verify_in_new_process': fail}],
    ids=['while files are written', 'in verification'],
)
def test_a_failed_export_leaves_the_old_bundle(evaluated, copy, monkeypatch, faults):
    before = contents(copy)
    for name, fault in faults.items():
        monkeypatch.setattr(exporting, name, fault)
    with pytest.raises(ParityError):
        export(evaluated, copy)
    assert contents(copy) == before
    assert os.listdir(copy.parent) == ['b']


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_an_interrupt_while_the_bundle_is_replaced_leaves_the_old_one(evaluated, copy, monkeypatch, error):
    before = contents(copy)
    monkeypatch.setattr(exporting, 'write_files', do_nothing)
    monkeypatch.setattr(exporting, 'verify_in_new_process', do_nothing)
    replace, calls = os.replace, []

    def interrupt(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise error('stopped')
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders, 'exchange', lambda first, second: False)  # a system that needs two renames
        patch.setattr(os, 'replace', interrupt)
        with pytest.raises((CXRError, KeyboardInterrupt)):
            export(evaluated, copy)
    assert contents(copy) == before
    assert os.listdir(copy.parent) == ['b']


def test_only_a_bundle_is_replaced(evaluated, bundle, tmp_path):
    folder = tmp_path / 'b'
    folder.mkdir()
    (folder / 'precious').write_text('x')
    with pytest.raises(UsageError, match='is not a bundle'):
        export(evaluated, folder)
    (folder / 'manifest.json').write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match='is not a bundle'):
        export(evaluated, folder)
    assert (folder / 'precious').read_text() == 'x'
    with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
        archive.writestr('image.jpeg', b'x')
    with pytest.raises(UsageError, match='is not a bundle'):
        export(evaluated, tmp_path / 'images.zip', as_zip=True)


def test_a_bundle_with_other_files_in_its_folder_is_not_replaced(evaluated, copy):
    (copy / 'image.jpeg').write_text('x')
    with pytest.raises(UsageError, match='is not a bundle'):
        export(evaluated, copy)


def make_schema_1(bundle: Path) -> None:
    """Change a bundle to the files and the schema that versions before 0.1.0 wrote."""
    (bundle / SELFTEST).rename(bundle / 'canary.safetensors')
    manifest = json.loads((bundle / 'manifest.json').read_text())
    manifest['schema'] = 1
    manifest['files']['canary.safetensors'] = manifest['files'].pop(SELFTEST)
    (bundle / 'manifest.json').write_text(json.dumps(manifest))


def test_a_bundle_of_schema_1_may_be_replaced(copy):
    make_schema_1(copy)
    with pytest.raises(CXRError, match='schema 1'):
        Bundle.open(copy)
    check_destination(copy, as_zip=False)
    archive = copy.with_name('old.zip')
    with zipfile.ZipFile(archive, 'w') as file:
        for path in copy.iterdir():
            file.write(path, path.name)
    check_destination(archive, as_zip=True)


def test_a_folder_that_only_resembles_a_bundle_of_schema_1_is_not_replaced(copy, tmp_path):
    make_schema_1(copy)
    (copy / 'notes.txt').write_text('x')
    with pytest.raises(UsageError, match='contains other files'):
        check_destination(copy, as_zip=False)
    folder = tmp_path / 'extension'
    folder.mkdir()
    (folder / 'manifest.json').write_text('{"schema": 1}')
    with pytest.raises(UsageError, match='is not a bundle'):
        check_destination(folder, as_zip=False)


def test_the_name_must_fit_the_option_zip(evaluated, tmp_path):
    with pytest.raises(UsageError, match='must end in .zip'):
        export(evaluated, tmp_path / 'c', as_zip=True)
    with pytest.raises(UsageError, match='add --zip'):
        export(evaluated, tmp_path / 'c.zip')


def test_a_run_that_was_not_evaluated_is_not_exported(run, capsys, tmp_path):
    assert main(['export', str(run.path), '--out', str(tmp_path / 'b')]) == 2
    assert 'not evaluated' in capsys.readouterr().err


def test_images_of_another_data_set_make_no_gate(evaluated, tmp_path, monkeypatch):
    make_demo(tmp_path / 'images', images=40, size=64, seed=9)
    monkeypatch.setattr(Run, 'images', tmp_path / 'gone')
    monkeypatch.setenv('CXR_DATA', str(tmp_path / 'images'))
    with pytest.warns(CXRWarning, match='no input gate'):
        assert exporting.read_gate_samples(evaluated, None) == {}


def test_verification_reads_every_file(copy):
    verify(copy)
    with open(copy / 'MODEL_CARD.md', 'a') as file:
        file.write(' ')
    with pytest.raises(CXRError, match=r'MODEL_CARD.md: does not match its hash'):
        verify(copy)


def test_verification_finds_the_learner_of_another_network(copy, images):
    torch.manual_seed(3)
    recipe = make_recipe('baseline', size=64, batch_size=8)
    learn = recipe_learner(CXRDataLoaders.from_items(read_items(images), images, recipe), recipe)
    save_learner(learn, copy / 'learner.pkl', ModelConfig('baseline', 64, 0.5))
    seal(copy)
    with pytest.raises(ParityError):
        verify(copy)


@pytest.mark.slow  # starts a process that imports torch and fastai; `verify` itself is tested above
def test_verification_in_a_new_process_finds_other_predictions(copy, tmp_path, monkeypatch):
    (tmp_path / 'cxr_fastai.py').write_text('raise SystemExit("imported from the current folder")')
    monkeypatch.chdir(tmp_path)
    p = load((copy / SELFTEST).read_bytes())['p']
    change_tensors(copy, SELFTEST, p=1 - p)
    seal(copy)
    with pytest.raises(ParityError, match=r'nothing was exported \(.*differs by'):
        verify_in_new_process(copy)
