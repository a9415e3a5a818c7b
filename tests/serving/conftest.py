"""A running app, images of every kind, and the rows that the Predictor returns for them; made once per session."""

import numpy as np
import pytest
from imagefiles import GREY, dicom, encoded
from services import running_app

from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.serving.app import Settings

TOKEN = '0123456789abcdef'


@pytest.fixture(scope='session')
def client(bundle):
    with running_app(Settings(bundle)) as client:
        yield client


@pytest.fixture(scope='session')
def protected(bundle):
    """A service with an access token and a host name of its own."""
    with running_app(Settings(bundle, hosts=('XRay.hospital.example',), token=TOKEN)) as client:
        yield client


@pytest.fixture(scope='session')
def paths(images, tmp_path_factory):
    """Some images of the data set, and one file for each reason to reject or fail an image."""
    folder = tmp_path_factory.mktemp('kinds')
    bad_files = {
        'empty.png': b'',
        'text.png': b'no image',
        'cut.png': encoded(GREY)[:-200],
        'deep.dcm': dicom(),
        'blank.png': encoded(np.zeros((96, 96), np.uint8)),
        'ct.dcm': dicom(Modality='CT'),
    }
    for name, data in bad_files.items():
        (folder / name).write_bytes(data)
    return [*sorted((images / 'test').rglob('*.jpeg'))[::3], *sorted(folder.iterdir())]


@pytest.fixture(scope='session')
def expected_rows(bundle, paths):
    """The rows of the Predictor, image by image, without the code at the start of its messages."""
    rows = Predictor.load(bundle, engine='onnx').predict(paths, batch_size=1, workers=1)
    return [row | {'message': row['message'] and row['message'].removeprefix(f'{row["code"]}: ')} for row in rows]
