"""The bundle: its files, the checks when it is opened, and what prediction with it loads."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bundlefiles import change_json, seal
from safetensors.numpy import load

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.foreign import LFS_POINTER
from cxr_fastai.inference.bundle import CARD, CONFIG, FILES, GATE, MANIFEST, SELFTEST, Bundle
from cxr_fastai.inference.config import WEIGHTS, find_network, sha256
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.tensors import tensor_bytes


@pytest.fixture
def image(images):
    return next((images / 'test').rglob('*.jpeg'))


def test_a_bundle_has_the_files_of_its_manifest(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert manifest['schema'] == 2
    assert set(manifest['files']) == set(FILES) == set(os.listdir(bundle)) - {MANIFEST}


def test_a_bundle_contains_no_name_of_images_folders_or_this_machine(bundle, evaluated, images):
    content = b''.join((bundle / name).read_bytes() for name in os.listdir(bundle))
    with zipfile.ZipFile(bundle / 'learner.pkl') as archive:
        content += b''.join(archive.read(name) for name in archive.namelist())
    secrets = [
        str(images),
        str(evaluated.path),
        sys.prefix,
        os.path.expanduser('~'),
        os.uname().nodename,
        *evaluated.items.path.map(os.path.basename),
        *evaluated.items.patient,
    ]
    assert not [secret for secret in secrets if len(secret) > 4 and secret.encode() in content]


def test_config_json_describes_the_model(bundle, evaluated):
    config = json.loads((bundle / CONFIG).read_text())
    assert config['schema'] == 2
    assert config['vocab'] == ['NORMAL', 'PNEUMONIA']
    assert config['threshold'] == evaluated.decision['threshold']
    assert config['items_sha256'] == sha256(evaluated / 'items.csv')
    assert config['normalisation']['mean'][0] == 0.485


def test_a_bundle_of_schema_1_must_be_exported_again(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / 'b')
    (tmp_path / 'b' / SELFTEST).rename(tmp_path / 'b' / 'canary.safetensors')
    change_json(tmp_path / 'b', MANIFEST, schema=1)
    seal(tmp_path / 'b')
    with pytest.raises(CXRError, match=r'made before version 0.1.0 \(schema 1\), .* Export it again') as caught:
        Bundle.open(tmp_path / 'b')
    assert '\n' not in str(caught.value)


def test_a_bundle_of_a_later_schema_names_the_schemas(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / 'b')
    change_json(tmp_path / 'b', CONFIG, schema=3)
    seal(tmp_path / 'b')
    with pytest.raises(CXRError, match='has the schema 3, but 2 is expected'):
        Bundle.open(tmp_path / 'b')


def test_views_of_arrays_are_stored_correctly():
    table = np.arange(8.0).reshape(4, 2)
    assert np.array_equal(load(tensor_bytes({'a': table[:, 1]}))['a'], [1, 3, 5, 7])


def test_a_zip_file_is_the_same_bundle(bundle, tmp_path, image):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        for path in bundle.iterdir():
            archive.write(path, path.name)
    folder_row, zip_row = (next(Predictor.load(path).predict([image])) for path in (bundle, tmp_path / 'b.zip'))
    assert folder_row == zip_row


@pytest.mark.parametrize(
    'name', ['bundle/{}', 'my bundles/bundle/{}', 'bundle\\{}', '{}'], ids=['folder', 'two folders', 'Windows', 'top']
)
def test_a_zip_file_made_by_hand_is_the_same_bundle(bundle, tmp_path, image, name):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        for path in bundle.iterdir():
            archive.writestr(zipfile.ZipInfo(name.format(path.name)), path.read_bytes())
            archive.writestr('__MACOSX/' + name.format(f'._{path.name}'), b'attributes')
        archive.writestr('__MACOSX/bundle/manifest.json', b'attributes')
        archive.writestr('bundle/.DS_Store', b'folder')
        archive.writestr('.DS_Store', b'folder')
    folder_row, zip_row = (next(Predictor.load(path).predict([image])) for path in (bundle, tmp_path / 'b.zip'))
    assert folder_row == zip_row


def test_a_zip_file_of_two_bundles_is_refused(bundle, tmp_path):
    with zipfile.ZipFile(tmp_path / 'b.zip', 'w') as archive:
        for folder in ('a', 'b'):
            archive.write(bundle / MANIFEST, f'{folder}/{MANIFEST}')
    with pytest.raises(CXRError, match=r'b\.zip: contains 2 bundles \(a, b\)'):
        Bundle.open(tmp_path / 'b.zip')


def test_other_files_in_the_folder_of_a_bundle_do_not_matter(bundle, tmp_path, image):
    folder = shutil.copytree(bundle, tmp_path / 'bundle')
    (folder / '.DS_Store').write_bytes(b'folder')
    (folder / '._config.json').write_bytes(b'attributes')
    assert next(Predictor.load(folder).predict([image])) == next(Predictor.load(bundle).predict([image]))


def test_an_unknown_engine_is_a_usage_error(bundle):
    with pytest.raises(UsageError, match='--engine int8: unknown. Choose one of auto, onnx, torch'):
        Bundle.open(bundle).engine('int8')


def test_a_missing_file_is_named(bundle):
    with pytest.raises(CXRError, match='the bundle has no weights.bin'):
        Bundle.open(bundle).read('weights.bin')


def test_a_run_without_a_model_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match='no model there'):
        find_network(tmp_path)


SLOW_IMPORTS = (
    'torch', 'torchvision', 'fastai', 'fastcore', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'accelerate', 'pydicom',
    'onnxruntime', 'fastapi', 'uvicorn', 'huggingface_hub', 'requests', 'asyncio', 'tqdm',
)  # fmt: skip
"""Modules that a prediction of an image with a bundle does not need in its own process."""


def test_prediction_with_a_bundle_imports_no_large_package(bundle, image):
    code = (
        'import sys; from cxr_fastai.cli import main; '
        f'code = main(["predict", {str(bundle)!r}, {str(image)!r}, "--no-gate"]); '
        f'print(code, {set(SLOW_IMPORTS)} & set(sys.modules))'
    )
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ)
    assert process.stdout.strip().endswith('0 set()')


@pytest.mark.parametrize(
    ('module', 'unneeded'),
    [
        ('cxr_fastai.__main__', {'typer', 'rich', 'numpy', 'importlib.metadata'}),
        ('cxr_fastai.inference.onnx_process', {'typer', 'rich', 'PIL', 'pandas', 'importlib.metadata'}),
        ('cxr_fastai.images.decoder_process', {'typer', 'rich', 'pandas', 'pydicom', 'importlib.metadata'}),
    ],
)
def test_the_processes_of_a_prediction_import_little(module, unneeded):
    code = f'import sys; before = set(sys.modules); import {module}; print({unneeded} & set(sys.modules) - before)'
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == 'set()'


def run_program(*words) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-m', 'cxr_fastai', *map(str, words)], capture_output=True, text=True)


@pytest.mark.parametrize('options', [[], ['--engine', 'torch'], ['--device=cpu'], ['--precision', 'bf16']])
def test_the_program_predicts_whatever_it_started_ahead(bundle, image, options):
    done = run_program('predict', bundle, image, '--no-gate', *options)
    assert done.returncode == 0 and '1 image, ' in done.stdout and not done.stderr


COUNT_PROCESSES = """
import sys
started = []
sys.addaudithook(lambda event, details: started.append(details[1]) if event == 'subprocess.Popen' else None)
from cxr_fastai.__main__ import run
try:
    run()
finally:
    names = ('onnx_process', 'decoder_process')
    print(*(name for command in started for name in names if any(name in str(word) for word in command)))
"""


def test_a_prediction_starts_one_process_of_each_kind(bundle, image):
    command = [sys.executable, '-c', COUNT_PROCESSES, 'predict', bundle, image, '--no-gate']
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'onnx_process decoder_process'


def test_a_process_that_was_started_for_nothing_changes_no_error(bundle, tmp_path):
    missing = run_program('predict', bundle, tmp_path / 'missing.jpeg')
    assert missing.returncode == 3 and 'missing.jpeg' in missing.stderr and 'Traceback' not in missing.stderr
    too_long = run_program('predict', 'x' * 5000, tmp_path / 'missing.jpeg')
    assert too_long.returncode > 0 and 'error' in too_long.stderr.lower() and 'Traceback' not in too_long.stderr
    (tmp_path / 'model.zip').write_bytes(b'not a zip file')
    no_zip = run_program('predict', tmp_path / 'model.zip', bundle / 'config.json')
    assert no_zip.returncode > 0 and 'Traceback' not in no_zip.stderr


def test_a_training_that_was_interrupted_is_named(tmp_path):
    (tmp_path / 'state.pt').write_bytes(b'')
    with pytest.raises(UsageError, match=r'interrupted, so it has no network yet. `cxr-fastai train --resume'):
        find_network(tmp_path)


def test_a_folder_without_one_of_its_files_is_named(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    (copy / GATE).unlink()
    with pytest.raises(UsageError, match='the bundle lacks its file gate.safetensors'):
        Predictor.load(copy)


@pytest.mark.parametrize('name', [CONFIG, CARD, MANIFEST])
def test_texts_with_line_ends_of_windows_are_unchanged(bundle, tmp_path, name):
    copy = shutil.copytree(bundle, tmp_path / 'b')
    (copy / name).write_bytes((copy / name).read_bytes().replace(b'\n', b'\r\n'))
    opened = Bundle.open(copy)
    assert opened.config == Bundle.open(bundle).config
    assert opened.read(CARD) == Bundle.open(bundle).read(CARD)


def test_other_changes_of_line_ends_are_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / 'b')
    (copy / CONFIG).write_bytes((copy / CONFIG).read_bytes().replace(b'\n', b'\n\n'))
    with pytest.raises(CXRError, match='does not match its hash'):
        Bundle.open(copy)


@pytest.mark.parametrize('as_zip', [False, True])
@pytest.mark.parametrize('name', [CONFIG, SELFTEST, WEIGHTS])
def test_a_pointer_of_git_lfs_in_a_bundle_is_named(bundle, tmp_path, name, as_zip):
    copy = shutil.copytree(bundle, tmp_path / 'b')
    (copy / name).write_bytes(LFS_POINTER + b'.github.com/spec/v1\n')
    if as_zip:
        copy = Path(shutil.make_archive(str(copy), 'zip', copy))
    with pytest.raises(CXRError, match=f'{name}: a pointer of Git LFS, not the file itself. Run `git lfs pull`'):
        Bundle.open(copy).engine('torch')


def test_a_missing_bundle_is_not_called_something_else(tmp_path):
    with pytest.raises(UsageError, match='gone: no such file or folder'):
        Bundle.open(tmp_path / 'gone')
