"""Files that are no models are named for what they are."""

import pickle
import shutil
from pathlib import Path

import pytest

from cxr_fastai.core.errors import UsageError
from cxr_fastai.inference.pickles import UntrustedError
from cxr_fastai.inference.predictor import Predictor

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n'


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('image.jpeg', b'\xff\xd8\xff\xe0', 'an image. Name the model first, then the images'),
        ('image.dcm', bytes(128) + b'DICM', 'an image'),
        ('learner.pkl', POINTER, r'a pointer of Git LFS, not the file itself. Run `git lfs pull`'),
        ('config.json', b'{\r\n  "schema": 2}', 'a JSON file. Name the run folder or the bundle that contains it'),
        ('data.json', b'[]', 'a JSON file'),
        ('notes.txt', b'text', 'not a model file. Name a run folder'),
        ('learner', b'', 'not a model file'),
    ],
)
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=f'{name}: {message}'):
        Predictor.load(tmp_path / name)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [('model.onnx', 'an ONNX file'), ('model.safetensors', 'a file of weights'), ('config.json', 'a JSON file')],
)
def test_a_file_of_a_bundle_points_to_the_bundle(bundle, name, kind):
    if not (bundle / name).exists():
        pytest.skip('needs pip install "cxr_fastai[onnx]"')
    with pytest.raises(UsageError) as caught:
        Predictor.load(bundle / name)
    assert kind in str(caught.value)
    assert str(caught.value).endswith(f'contains it: {bundle}.')


@pytest.mark.parametrize('name', ['model.pkl', 'model.bin', 'model'])
def test_a_pickle_of_any_name_must_be_trusted(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    with pytest.raises(UntrustedError):
        Predictor.load(tmp_path / name)


def test_a_zip_in_capitals_is_a_bundle(bundle, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / 'bundle'), 'zip', bundle))
    capitals = archive.rename(tmp_path / 'BUNDLE.ZIP')
    assert Predictor.load(capitals).config == Predictor.load(bundle).config
