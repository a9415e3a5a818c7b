"""The trained model of the package is complete, small, verified, and says what it is, and where it comes from."""

import json
import runpy
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import setuptools

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import write_csv, write_json
from cxr_fastai.core.run import Run
from cxr_fastai.core.run_files import OUT_OF_FOLD
from cxr_fastai.core.series import Series
from cxr_fastai.evaluation.cross_validation import METRICS
from cxr_fastai.evaluation.evaluation import evaluate
from cxr_fastai.evaluation.intervals import format_estimate
from cxr_fastai.inference import pretrained
from cxr_fastai.inference.bundle import CARD, FILES, MANIFEST, Bundle
from cxr_fastai.inference.config import WEIGHTS, identify_network, sha256
from cxr_fastai.inference.onnx_start import ONNX
from cxr_fastai.models.architectures import make_recipe
from cxr_fastai.publishing import pretrained as publishing
from cxr_fastai.publishing.model_card import EXTERNAL_VALIDITY, NOT_A_DEVICE
from cxr_fastai.publishing.pretrained import CODE, IMAGES, MAX_BUNDLE, publish_pretrained

pytest.importorskip('onnxruntime', reason='needs pip install "cxr_fastai[onnx]"')
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def series(evaluated, tmp_path_factory) -> Series:
    """A series with predictions and metrics, but without its networks."""
    folder = tmp_path_factory.mktemp('series') / 'folds'
    series = Series(folder, 'folds', 5, evaluated.recipe, 'f' * 64)
    series.create()
    write_csv(folder / OUT_OF_FOLD, evaluated.predicted('valid').assign(fold='fold-0'))
    write_json(folder / METRICS, {'metrics': evaluated.metrics['valid']})
    return series


@pytest.fixture(scope='module')
def final(evaluated, series, tmp_path_factory) -> Run:
    """A run with the out-of-fold predictions of that series."""
    folder = tmp_path_factory.mktemp('final') / 'run'
    shutil.copytree(evaluated.path, folder)
    shutil.copy(series.path / OUT_OF_FOLD, folder)
    evaluate(folder, split='valid', again=False)
    return Run(folder)


@pytest.fixture(scope='module')
def published(final, series, tmp_path_factory) -> Path:
    return publish_pretrained(final, series, tmp_path_factory.mktemp('package') / 'pretrained')


def check_box(folder: Path) -> None:
    """Assert what holds for every trained model of the package: its files, its size, its facts and its card."""
    facts = json.loads(folder.with_suffix('.json').read_text())
    bundle = Bundle.open(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {*bundle.manifest, MANIFEST} and {ONNX, CARD} <= names <= {*FILES, MANIFEST}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size == facts['bytes'] <= MAX_BUNDLE
    assert bundle.identity == facts['manifest_sha256'] and sha256(folder / ONNX) == facts['onnx_sha256']
    assert all(bundle.read(name) for name in bundle.manifest)
    bundle.selftest.check(bundle.engine('onnx'), folder)
    assert bundle.facts['weights'] == facts['weights'] and facts['weights']['largest_change'] <= 1e-3
    assert (
        bundle.config.arch == facts['recipe']['arch']
        and bundle.facts['items_sha256'] == facts['images']['items_sha256']
    )
    card = bundle.read(CARD).decode()
    for text in (format_estimate(facts['out_of_fold']['auc']), *facts['licences'], NOT_A_DEVICE, EXTERNAL_VALIDITY):
        assert text in card
    assert 'CC BY 4.0' in card and 'Kermany' in card and 'Apache License 2.0' in card
    assert 'a human' not in card
    assert len(facts['commands']) == 5 and str(ROOT) not in card + json.dumps(facts)


def test_a_published_model_is_complete(published):
    check_box(published)


def test_the_model_of_the_package_is_complete():
    if not (pretrained.FOLDER / MANIFEST).is_file():
        pytest.skip('the package contains no trained model yet: `make pretrained` trains it')
    check_box(pretrained.FOLDER)


def test_the_facts_say_how_the_model_was_made(published, final, series, monkeypatch):
    monkeypatch.setattr(pretrained, 'FACTS', published.with_suffix('.json'))
    facts = pretrained.pretrained_facts()
    assert facts['commands'][0].endswith('--folds 5 --out FOLDS') and '--recipe reference' in facts['commands'][2]
    assert facts['network_sha256'] == identify_network(final.path) == sha256(final / WEIGHTS)
    assert facts['images']['images_sha256'] == series.images
    assert facts['images']['trained_on'] == (final.items.split == 'train').sum()
    assert facts['out_of_fold']['auc']['value'] == final.metrics['valid']['auc']['value']
    assert facts['licences'] == [CODE, IMAGES, 'Initial weights: random numbers.']


def test_a_run_without_the_out_of_fold_predictions_is_refused(evaluated, final, series, tmp_path):
    with pytest.raises(UsageError, match=r'does not have the out-of-fold predictions.*--out-of-fold'):
        publish_pretrained(evaluated, series, tmp_path / 'pretrained')
    other = Run(Path(shutil.copytree(final.path, tmp_path / 'run')))
    write_csv(other / OUT_OF_FOLD, evaluated.predicted('valid').assign(p_pneumonia=0.5, fold='fold-0'))
    with pytest.raises(UsageError, match='does not have the out-of-fold predictions'):
        publish_pretrained(other, series, tmp_path / 'pretrained')
    assert not (tmp_path / 'pretrained').exists()


def test_a_model_that_is_too_large_is_refused(final, series, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, 'MAX_BUNDLE', 1000)
    with pytest.raises(CXRError, match='but the model of the package may have 1,000'):
        publish_pretrained(final, series, tmp_path / 'pretrained')
    assert not (tmp_path / 'pretrained.json').exists()


def test_the_licence_of_initial_weights_must_be_known():
    recipe = make_recipe('resnet50')
    with pytest.raises(UsageError, match='resnet50: the licence of its initial weights is not recorded'):
        publishing._weights_licence(recipe)
    recipe = replace(recipe, arch='efficientnet_lite0', weights='imagenet')
    assert 'Apache License 2.0' in publishing._weights_licence(recipe)
    with pytest.raises(UsageError, match='from ImageNet weights'):
        publishing._weights_licence(replace(recipe, weights='mine.pth'))


def test_every_file_of_the_model_is_in_the_wheel_and_in_the_source_archive(published, monkeypatch):
    arguments: dict = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **options: arguments.update(options))
    runpy.run_path(str(ROOT / 'setup.py'))
    patterns = arguments['package_data']['cxr_fastai']
    files = ['pretrained.json', *(f'pretrained/{path.name}' for path in published.iterdir())]
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
    assert not any(package.startswith('cxr_fastai.pretrained') for package in arguments['packages'])
    lines = (ROOT / 'MANIFEST.in').read_text().splitlines()
    assert {'recursive-include cxr_fastai/pretrained *', 'include cxr_fastai/pretrained.json'} <= set(lines)
