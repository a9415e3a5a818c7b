"""Fixtures of the tests of hostile model files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cxr_fastai.cli import main


@pytest.fixture(scope='session')
def image(images) -> Path:
    return next((images / 'test').rglob('*.jpeg'))


@pytest.fixture
def changed(bundle, tmp_path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(bundle, tmp_path / 'bundle'))


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """The file that every attack tries to write. What the test trusts is forgotten afterwards."""
    monkeypatch.setenv('CXR_TRUST', str(tmp_path / 'trust.json'))
    return tmp_path / 'marker'


@pytest.fixture
def refused(image, marker, capfd) -> Callable[..., int]:
    """`predict` with a hostile model file, which must run no code and end with an error of one line; the exit code."""

    def predict(model: Path, *options: str) -> int:
        capfd.readouterr()
        code = main(['predict', str(model), str(image), *options])
        lines = capfd.readouterr().err.splitlines(keepends=True)
        errors = ''.join(line for line in lines if 'has no input gate' not in line)
        assert not marker.exists()
        assert code != 0, errors
        assert errors.startswith('error: ') and errors.endswith('\n') and errors.count('\n') == 1, errors
        assert len(errors) < 1000 and errors.strip().isprintable()
        return code

    return predict
