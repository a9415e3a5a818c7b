"""Shared films and runs: synthetic, small, made once a session. `CXR_DATA` is hidden from all but `real` tests."""
import os
import shutil
from pathlib import Path

import pytest
import torch

from cxr_fastai.cli import main
from cxr_fastai.demo import make_demo
from cxr_fastai.run import Run

torch.set_num_threads(1)  # small tensors gain nothing by more, and lose much where the cores are busy
REAL = os.environ.pop('CXR_DATA', None)


@pytest.fixture(scope='session', autouse=True)
def nothing_of_the_user(tmp_path_factory) -> None:
    """No test meets, or leaves, films in the user's own cache, or hashes in the user's own trust store."""
    os.environ['CXR_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    os.environ['CXR_TRUST'] = str(tmp_path_factory.mktemp('trust')/'trust.json')


@pytest.fixture(scope='session')
def films(tmp_path_factory) -> Path:
    """Sixty synthetic films of 96 px in the Kaggle layout."""
    folder = tmp_path_factory.mktemp('data')/'films'
    make_demo(folder, films=60, size=96, seed=0)
    return folder


@pytest.fixture(scope='session')
def run(films, tmp_path_factory) -> Run:
    """A baseline trained for two epochs through the command line; not to be changed by a test."""
    folder = tmp_path_factory.mktemp('runs')/'run'
    assert main(['train', '--data', str(films), '--out', str(folder), '--epochs', '2', '--size', '64',
                 '--batch-size', '8', '--seed', '1', '--workers', '0']) == 0
    return Run.open(folder)


@pytest.fixture(scope='session')
def real_films() -> Path:
    """The real films that CXR_DATA names; skips where it is not set."""
    if not REAL: pytest.skip('CXR_DATA does not name the real films')
    return Path(REAL)


@pytest.fixture(scope='session')
def evaluated(run, films, tmp_path_factory) -> Run:
    """A copy of that run, evaluated on its test films through the command line; not to be changed by a test."""
    folder = tmp_path_factory.mktemp('evaluated')/'run'
    shutil.copytree(run.path, folder)
    assert main(['evaluate', str(folder), '--data', str(films)]) == 0
    return Run.open(folder)


@pytest.fixture(scope='session')
def bundle(evaluated, films, tmp_path_factory) -> Path:
    """That run as a bundle, exported through the command line; not to be changed by a test."""
    folder = tmp_path_factory.mktemp('bundles')/'bundle'
    assert main(['export', str(evaluated.path), '--out', str(folder)]) == 0
    return folder
