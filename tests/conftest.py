"""Shared images and runs: synthetic, small, made once. `CXR_DATA` is hidden from all but `real` tests."""

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import pytest
from filelock import FileLock
from PIL import Image
from runfiles import COPY

os.environ['OMP_NUM_THREADS'] = '1'  # small arrays gain nothing by more, and lose much where the cores are busy
from cxr_fastai.cli import main
from cxr_fastai.core.environment import Launch, join_launch
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import Series
from cxr_fastai.images.synthetic import make_demo
from cxr_fastai.inference import pretrained
from cxr_fastai.inference.pickles import trust

REAL = os.environ.pop('CXR_DATA', None) or os.environ.get('CXR_REAL_IMAGES')
if REAL:
    os.environ['CXR_REAL_IMAGES'] = REAL  # for the workers of pytest-xdist, which start later


@pytest.fixture(scope='session', autouse=True)
def nothing_of_the_user(tmp_path_factory) -> None:
    """No test meets, or leaves, images in the user's own cache, or hashes in the user's own trust store."""
    os.environ['CXR_CACHE'] = str(tmp_path_factory.mktemp('cache'))
    os.environ['CXR_TRUST'] = str(tmp_path_factory.mktemp('trust') / 'trust.json')


@pytest.fixture(scope='session')
def once(tmp_path_factory, nothing_of_the_user) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder by its name, once: the first worker of pytest-xdist that asks makes it, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = base / name / name, base / f'{name}.done'
        with FileLock(base / f'{name}.lock'):
            if done.exists():
                trust_models(folder)
            else:
                shutil.rmtree(folder.parent, ignore_errors=True)
                folder.parent.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_once


def trust_models(folder: Path) -> None:
    """Trust in this worker, too, what another has made."""
    for path in folder.rglob('*.pkl'):
        trust(hashlib.sha256(path.read_bytes()).hexdigest(), 'made by another worker')


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope='session')
def images(once) -> Path:
    """Sixty synthetic images of 96 px in the Kaggle layout; not to be changed by a test."""
    return once('images', lambda folder: make_demo(folder, images=60, size=96, seed=0))


@pytest.fixture(scope='session')
def run(once, images) -> Run:
    """A baseline trained for two epochs through the command line; not to be changed by a test."""
    return Run.open(
        once(
            'run',
            lambda folder: command(
                'train',
                '--data',
                images,
                '--out',
                folder,
                '--epochs',
                2,
                '--size',
                64,
                '--batch-size',
                8,
                '--seed',
                1,
                '--workers',
                0,
                '--valid',
                'official',  # all twelve images, so that every metric is defined
            ),
        )
    )


class Terminal(io.StringIO):
    """Standard error as a terminal, for what is done in `with Terminal().used() as text`."""

    def isatty(self) -> bool:
        return True

    def used(self) -> redirect_stderr:
        return redirect_stderr(self)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Each test starts and ends as a process that works alone."""
    yield
    join_launch(Launch())


@pytest.fixture(autouse=True)
def same_variables() -> Iterator[None]:
    """No test leaves other environment variables behind, such as another trust store."""
    variables = dict(os.environ)
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


@pytest.fixture(autouse=True)
def same_architectures() -> Iterator[None]:
    """No test leaves architectures behind that it registered."""
    registry = sys.modules.get('cxr_fastai.models.registry')
    registered = dict(registry._registered) if registry else {}
    yield
    registry = sys.modules.get('cxr_fastai.models.registry')
    if registry:
        registry._registered.clear()
        registry._registered.update(registered)


@pytest.fixture(autouse=True)
def same_figure_settings() -> Iterator[None]:
    """No test leaves settings of matplotlib or open figures behind."""
    matplotlib = sys.modules.get('matplotlib')
    with matplotlib.rc_context() if matplotlib else nullcontext():
        yield
    pyplot = sys.modules.get('matplotlib.pyplot')
    if pyplot:
        pyplot.close('all')


@pytest.fixture
def first_process() -> None:
    """In the test, this process is the first of two that work together."""
    join_launch(Launch(rank=0, processes=2))


@pytest.fixture
def second_process() -> None:
    """In the test, this process is the second of two that work together."""
    join_launch(Launch(rank=1, processes=2))


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture(scope='session')
def real_images() -> Path:
    """The real images that CXR_DATA names; skips where it is not set."""
    if not REAL:
        pytest.skip('needs the real images: set CXR_DATA to their folder (see docs/data.md) and run make test-all')
    return Path(REAL)


@pytest.fixture(scope='session')
def evaluated(once, run, images) -> Run:
    """A copy of that run, evaluated on its test images through the command line; not to be changed by a test."""

    def evaluate(folder: Path) -> None:
        shutil.copytree(run.path, folder)
        command('evaluate', folder, '--data', images)

    return Run.open(once('evaluated', evaluate))


@pytest.fixture(scope='session')
def half_bundle(once, evaluated) -> Path:
    """That run as a bundle with weights in float16, for ONNX Runtime only; not to be changed by a test."""
    pytest.importorskip('onnx', reason='needs pip install "cxr_fastai[onnx]"')
    return once('half_bundle', lambda folder: command('export', evaluated.path, '--half', '--out', folder))


@pytest.fixture
def boxed(half_bundle, tmp_path, monkeypatch) -> Path:
    """A copy of that bundle in place of the one that the package contains."""
    folder = Path(shutil.copytree(half_bundle, tmp_path / 'package' / 'pretrained'))
    monkeypatch.setattr(pretrained, 'FOLDER', folder)
    monkeypatch.setattr(pretrained, 'FACTS', folder.with_suffix('.json'))
    return folder


@pytest.fixture(scope='session')
def folds(once, images) -> Series:
    """A cross-validation with three folds; not to be changed by a test."""
    from cxr_fastai.models.architectures import make_recipe
    from cxr_fastai.training.series import train_folds

    recipe = make_recipe('baseline', epochs=1, size=48, batch_size=8, seed=3, workers=0)
    return Series.open(once('folds', lambda folder: train_folds(recipe, images, folder, 3)))


@pytest.fixture(scope='session')
def bundle(once, evaluated) -> Path:
    """That run as a bundle, exported through the command line; not to be changed by a test."""
    return once('bundle', lambda folder: command('export', evaluated.path, '--out', folder))


@pytest.fixture(scope='session')
def images_with_a_copy(once) -> Path:
    """Sixty synthetic images, and a copy of a normal one among those of pneumonia; not to be changed by a test."""

    def make(folder: Path) -> None:
        make_demo(folder, images=60, size=96, seed=0)
        original = sorted((folder / 'train/NORMAL').iterdir())[0]
        Image.open(original).resize((90, 90)).save(folder / COPY, quality=90)

    return once('images-with-a-copy', make)


@pytest.fixture(scope='session')
def folds_with_a_copy(once, images_with_a_copy) -> Series:
    """Two folds of these images, not evaluated; not to be changed by a test."""

    def train(folder: Path) -> None:
        options = ('--epochs', 1, '--size', 48, '--batch-size', 8, '--workers', 0, '--folds', 2)
        command('train', '--data', images_with_a_copy, '--out', folder, *options)

    return Series.open(once('folds-with-a-copy', train))
