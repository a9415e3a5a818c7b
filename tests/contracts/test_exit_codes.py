"""The exit code of the command line for each exception, and for images that cannot be used."""

import signal

import pytest

from cxr_fastai.cli import main
from cxr_fastai.core.errors import CXRError, ImageError, OutputError, Stopped, UsageError
from cxr_fastai.inference.pickles import UntrustedError
from cxr_fastai.inference.selftest import ParityError


@pytest.mark.parametrize(
    'error, code',
    [
        (CXRError('x'), 1),
        (ImageError('x'), 1),
        (UsageError('x'), 2),
        (UntrustedError('x'), 4),
        (ParityError('x'), 5),
        (OutputError('x'), 6),
        (Stopped(signal.SIGINT), 130),
        (Stopped(signal.SIGTERM), 143),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_every_exception_has_its_exit_code(error, code):
    assert error.exit_code == code


def test_prediction_ends_with_zero_or_with_three_if_an_image_fails(bundle, images, tmp_path):
    image = next((images / 'test').rglob('*.jpeg'))
    (tmp_path / 'empty.jpeg').write_bytes(b'')
    assert main(['predict', str(bundle), str(image), '--no-gate']) == 0
    assert main(['predict', str(bundle), str(image), str(tmp_path / 'empty.jpeg'), '--no-gate']) == 3


def test_prediction_ends_with_four_for_an_untrusted_file(run, images, tmp_path, monkeypatch):
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    assert main(['predict', str(run / 'learner.pkl'), str(images / 'test')]) == 4


def test_prediction_ends_with_two_for_a_model_that_does_not_exist(images, tmp_path):
    assert main(['predict', str(tmp_path / 'none'), str(images / 'test')]) == 2
