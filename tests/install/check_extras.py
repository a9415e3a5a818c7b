"""Install the base requirements alone, then each extra alone, and check that their features work.

    python tests/install/check_extras.py            # base, then every extra: `make test-plain`
    python tests/install/check_extras.py base       # the base alone
    python tests/install/check_extras.py onnx       # the base and this extra

The base requirements are installed into an environment of their own below `.venv/plain`. Each extra is installed into a
small environment that can import the base, so only the packages of the extra are added. The exit code is 1 if a check
failed.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / '.venv' / 'plain'
WORK = PLACE / 'work'
UNPINNED = {'mlflow', 'space'}
"""Extras whose packages require older versions of others than the tested ones, such as pandas 2 or Pillow 12."""
SECONDS = 900
"""Longest time that a check may take."""

FINE_TUNE = """
from pathlib import Path
from cxr_fastai.all import *
root = Path('images')
recipe = make_recipe('baseline', epochs=1, size=48, batch_size=8)
learn = recipe_learner(CXRDataLoaders.from_items(read_items(root), root, recipe), recipe)
learn.fine_tune(1)
"""
DICOM = """
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
image = Dataset()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1'
image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = '1.2.3'
image.StudyInstanceUID, image.SeriesInstanceUID = '1.2.4', '1.2.5'
image.Modality, image.PhotometricInterpretation, image.SamplesPerPixel = 'CR', 'MONOCHROME2', 1
image.Rows = image.Columns = 128
image.BitsAllocated = image.BitsStored = 16
image.HighBit, image.PixelRepresentation = 15, 0
image.PixelData = np.random.default_rng(0).integers(0, 4096, (128, 128)).astype('<u2').tobytes()
image.save_as('image.dcm', enforce_file_format=True)
"""


class Environment:
    """A virtual environment, and commands that run in `WORK` with its programs."""

    def __init__(self, folder: Path, base: Environment | None = None) -> None:
        self.folder = folder
        self.base = base

    def create(self, requirement: str) -> None:
        """Install the tested versions of `requirement`, except for packages that the base environment has already."""
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, '-m', 'venv', self.folder], check=True)
        if self.base:
            (self.packages / 'base.pth').write_text(f'{self.base.packages}\n')
        pip = [self.folder / 'bin/python', '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
        versions = [] if self.folder.name in UNPINNED else ['-c', ROOT / 'constraints.txt']
        subprocess.run([*pip, *versions, requirement], check=True, cwd=ROOT)

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob('lib/python*/site-packages'))

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of its commands, which do not read or write files of the user."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(('CXR_', 'PYTHON'))}
        own = {'CXR_TRUST': str(WORK / 'trust.json'), 'CXR_CACHE': str(WORK / 'cache'), 'WANDB_MODE': 'offline'}
        return kept | own | {'PATH': f'{self.folder / "bin"}:{kept["PATH"]}', 'COLUMNS': '300'}

    def run(self, *words: object, code: int = 0) -> str:
        """Run `python` with `words` and return its output. Raises `AssertionError` for another exit code."""
        python = self.folder / 'bin/python'
        done = subprocess.run(
            [python, *map(str, words)], cwd=WORK, env=self.variables, capture_output=True, text=True, timeout=SECONDS
        )
        text = done.stdout + done.stderr
        assert done.returncode == code, f'{" ".join(map(str, words))}: exit code {done.returncode}\n{text[-3000:]}'
        return text

    def command(self, *words: object, code: int = 0) -> str:
        """Run `cxr-fastai` with `words`."""
        return self.run('-m', 'cxr_fastai', *words, code=code)

    def refuses(self, extra: str, *words: object) -> None:
        """Check that `cxr-fastai` with `words` fails in one line that names the `extra` to install."""
        lines = [line for line in self.command(*words, code=2).splitlines() if line.startswith('error:')]
        assert len(lines) == 1 and f'cxr_fastai[{extra}]' in lines[0], lines


def train(*more: object) -> tuple[object, ...]:
    """The words of a command that trains for a few seconds."""
    return ('train', '--data', 'images', '--epochs', 1, '--size', 48, '--batch-size', 8, *more)


def check_base(env: Environment) -> None:
    """The demo on 100 images, `fine_tune`, prediction from a run, a learner and a bundle."""
    text = env.command('demo', '--out', 'demo', '--images', 100, '--size', 48, '--epochs', 1)
    assert 'cxr_fastai[onnx]' in text, 'export does not warn that no ONNX file is written'
    assert (WORK / 'demo/run/report.html').is_file() and not list(WORK.glob('demo/bundle/*.onnx'))
    shutil.copytree(WORK / 'demo/images', WORK / 'images')
    env.run('-c', FINE_TUNE)
    image = next((WORK / 'images/test/NORMAL').iterdir())
    for model in ('run', 'run/learner.pkl', 'bundle'):
        table = WORK / f'{Path(model).name}.csv'
        env.command('predict', WORK / 'demo' / model, image, '--no-gate', '--out', table)
        assert len(table.read_text().splitlines()) == 2


def check_missing(env: Environment) -> None:
    """Without its extra, each feature names the extra to install, in one line."""
    (WORK / 'image.dcm').write_bytes(b'\0' * 128 + b'DICM' + b'\0' * 64)
    assert 'cxr_fastai[dicom]' in env.command('predict', 'demo/bundle', 'image.dcm', code=3)
    env.refuses('timm', *train('--arch', 'resnet18', '--weights', 'none'))
    env.refuses('lite', *train('--arch', 'efficientnet_lite0'))
    env.refuses('hub', 'push-to-hub', 'demo/bundle', 'me/model')
    env.refuses('serve', 'serve', 'demo/bundle')
    env.refuses('dicom', 'predict', 'demo/bundle', 'images/test/NORMAL', '--dicom-out', 'reports')
    env.refuses('parquet', 'predict', 'demo/bundle', 'images/test/NORMAL', '--out', 'rows.parquet')
    for tracker in ('tensorboard', 'wandb', 'mlflow'):
        env.refuses(tracker, *train('--track', tracker))
    assert 'cxr_fastai[kaggle]' in env.command('data', 'download', 'kaggle', '--source', 'kaggle', code=1)


def check_dicom(env: Environment) -> None:
    env.run('-c', DICOM)
    text = env.command('predict', 'demo/bundle', 'image.dcm', '--no-gate', '--dicom-out', 'reports')
    assert 'E_DICOM' not in text and len(list((WORK / 'reports').iterdir())) == 1


def check_timm(env: Environment) -> None:
    env.command(*train('--arch', 'resnet18', '--weights', 'none', '--limit', 8, '--out', 'runs/timm'))


def check_lite(env: Environment) -> None:
    env.command(*train('--arch', 'efficientnet_lite0', '--limit', 8, '--out', 'runs/lite'))


def check_onnx(env: Environment) -> None:
    env.command('export', 'demo/run', '--out', 'onnx')
    assert (WORK / 'onnx/model.onnx').is_file()
    env.command('predict', 'onnx', 'images/test/NORMAL', '--no-gate', '--engine', 'onnx')


def check_parquet(env: Environment) -> None:
    env.command('predict', 'demo/bundle', 'images/test/NORMAL', '--no-gate', '--out', 'rows.parquet')
    env.run('-c', 'import pandas; assert len(pandas.read_parquet("rows.parquet"))')


def check_hub(env: Environment) -> None:
    """Without a network only the connection fails."""
    text = env.command('push-to-hub', 'demo/bundle', 'me/model', code=1)
    assert 'cxr_fastai[hub]' not in text and 'Traceback' not in text


def check_kaggle(env: Environment) -> None:
    """Without a network only the connection fails."""
    text = env.command('data', 'download', 'kaggle', '--source', 'kaggle', code=1)
    assert 'cxr_fastai[kaggle]' not in text and 'Traceback' not in text


def check_scale(env: Environment) -> None:
    launch = (
        '-m',
        'accelerate.commands.launch',
        '--cpu',
        '--num_processes',
        2,
        '--num_machines',
        1,
        '-m',
        'cxr_fastai',
    )
    env.run(*launch, *train('--limit', 16, '--out', 'runs/scale'))


def check_tensorboard(env: Environment) -> None:
    env.command(*train('--limit', 8, '--track', 'tensorboard', '--out', 'runs/tensorboard'))


def check_wandb(env: Environment) -> None:
    env.command(*train('--limit', 8, '--track', 'wandb', '--out', 'runs/wandb'))


def check_mlflow(env: Environment) -> None:
    env.command(*train('--limit', 8, '--track', 'mlflow', '--out', 'runs/mlflow'))


def check_serve(env: Environment) -> None:
    """A served bundle answers a posted image, with ONNX Runtime if `check_onnx` has exported a bundle for it."""
    bundle = 'onnx' if (WORK / 'onnx').is_dir() else 'demo/bundle'
    words = [env.folder / 'bin/python', '-m', 'cxr_fastai', 'serve', bundle, '--port', '0']
    with subprocess.Popen(
        words, cwd=WORK, env=env.variables, stderr=subprocess.STDOUT, stdout=subprocess.PIPE
    ) as server:
        try:
            address = first_match(server, r'http://127\.0\.0\.1:\d+')
            image = next((WORK / 'images/test/NORMAL').iterdir()).read_bytes()
            answer = post(f'{address}/v1/predict', image)
            assert '"p_pneumonia"' in answer, answer
        finally:
            server.terminate()


def check_space(env: Environment) -> None:
    """Gradio can be imported together with the package. `make test-all` also tests the page itself."""
    env.command('export', 'demo/run', '--out', 'again', '--space', 'space')
    env.run('-c', 'import gradio, cxr_fastai.inference.predictor')


def first_match(process: subprocess.Popen, pattern: str) -> str:
    """Return the first match of `pattern` in the output of `process`."""
    for line in process.stdout:
        match = re.search(pattern, line.decode())
        if match:
            return match[0]
    raise AssertionError(f'no {pattern} in the output of the server')


def post(address: str, image: bytes) -> str:
    """Post a form with one image and return the response; repeat the request until the model is loaded."""
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    kind = {'Content-Type': 'multipart/form-data; boundary=x'}
    request = urllib.request.Request(address, head + image + b'\r\n--x--\r\n', kind)
    for _ in range(60):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            time.sleep(1)
    raise AssertionError('the service did not become ready in a minute')


CHECKS: dict[str, Callable[[Environment], None]] = {
    'dicom': check_dicom,
    'timm': check_timm,
    'lite': check_lite,
    'onnx': check_onnx,
    'parquet': check_parquet,
    'hub': check_hub,
    'kaggle': check_kaggle,
    'serve': check_serve,
    'scale': check_scale,
    'tensorboard': check_tensorboard,
    'wandb': check_wandb,
    'mlflow': check_mlflow,
    'space': check_space,
}
"""Extra to its check. `serve` follows `onnx`, because it serves the bundle with the ONNX file."""


def extras() -> set[str]:
    """The extras that users install, by `settings.ini`."""
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini')
    names = {key.removesuffix('_requirements') for key in config['DEFAULT'] if key.endswith('_requirements')}
    return names - {'dev', 'docs'}


def report(name: str, check: Callable[[Environment], None], env: Environment, requirement: str | None = None) -> bool:
    """Install `requirement`, if there is one, run `check`, print a line, and return whether both succeeded."""
    start = time.monotonic()
    try:
        if requirement:
            env.create(requirement)
        check(env)
        result = 'works'
    except (AssertionError, subprocess.SubprocessError) as error:
        result = f'FAILED: {error}'
    print(f'{name:<12} {time.monotonic() - start:5.0f} s  {result}', flush=True)
    return result == 'works'


def main(names: list[str]) -> int:
    """Check the base, then the extras among `names` (default: all of them). Return 1 if a check failed, else 0."""
    assert set(CHECKS) == extras(), f'without a check: {extras() ^ set(CHECKS)}'
    unknown = set(names) - {'base', *CHECKS}
    assert not unknown, f'no such extras: {unknown}'
    base = Environment(PLACE / 'base')
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    shutil.rmtree(ROOT / 'build', ignore_errors=True)  # setuptools would also install the modules of an earlier build
    passed = [report('base', check_base, base, '.'), report('no extra', check_missing, base)]
    for name in CHECKS:
        if names and name not in names:
            continue
        env = Environment(PLACE / name, base)
        passed.append(report(name, CHECKS[name], env, f'.[{name}]'))
        shutil.rmtree(env.folder)
    return 0 if all(passed) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
