"""`export` writes the bundle of a run: a folder or zip file that contains all that prediction needs.

The bundle is written next to its destination and verified in a new process before it replaces an older one.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, atomic, writing
from cxr_fastai.core.folders import replaced_folder, sweep, temporary_folder
from cxr_fastai.core.run import Run, as_run
from cxr_fastai.data.splits import split_patients
from cxr_fastai.evaluation.results import check_results
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.evaluation.split_images import find_split, own_images
from cxr_fastai.inference.bundle import (
    BUNDLE,
    CARD,
    CONFIG,
    FILES,
    GATE,
    MANIFEST,
    SELFTEST,
    Bundle,
    is_bundle,
    manifest_text,
)
from cxr_fastai.inference.config import LEARNER, WEIGHTS, ModelConfig, config_text, save_weights, sha256
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine
from cxr_fastai.inference.gate import MAX_IMAGES, Gate
from cxr_fastai.inference.learner_files import read_learner
from cxr_fastai.inference.onnx_format import check_onnx
from cxr_fastai.inference.onnx_start import ONNX, onnx_threads
from cxr_fastai.inference.pickles import save_learner
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.selftest import ParityError, SelfTest
from cxr_fastai.inference.tensors import tensor_bytes
from cxr_fastai.models.ensembles import split_name
from cxr_fastai.models.inputs import MEAN, STD
from cxr_fastai.models.registry import check_declared
from cxr_fastai.publishing.half import HALF_BANK, Parity, measure_parity, store_half
from cxr_fastai.publishing.model_card import PLAIN, CardTexts, main_split, render_card
from cxr_fastai.training.restoring import load_learner

VERSIONED_PACKAGES = ('cxr_fastai', 'torch', 'safetensors', 'onnxruntime')
"""Packages with their versions in `config.json`."""
SCHEMA_1_SELFTEST = 'canary.safetensors'
SCHEMA_1_FILES = (*FILES, SCHEMA_1_SELFTEST, 'model.int8.onnx')
"""The files of bundles of schema 1, which cannot be opened any more, but may be replaced."""
VERIFY_CODE = """
import sys
from pathlib import Path
from cxr_fastai.publishing.exporting import verify
verify(Path(sys.argv[1]))
"""
BATCH_SIZE = 32
"""Number of images that pass through the network at once."""
INTENSITY = (
    '8 bits unchanged; more bits with the window that the file declares, otherwise from the 0.5th to the 99.5th '
    'percentile'
)
"""How grey levels are converted to 8 bits; a note in `config.json` for users of other software."""


def export(
    run: Run | StrPath,
    out: StrPath | None = None,
    as_zip: bool = False,
    half: bool = False,
    texts: CardTexts = PLAIN,
) -> Path:
    """Write the bundle of `run` to `out` and return its path.

    `out` is `bundle/` in the run by default; an existing bundle is replaced, also one of schema 1. With `as_zip`, the
    bundle is one zip file, and `out` must end in `.zip`. The bundle contains an ONNX file if the extra `onnx` is
    installed. With `half` it contains only an ONNX file, whose weights are stored as float16 and computed in float32.
    `texts` are those of the model card.

    Raises `UsageError` if the run has not been evaluated or `out` is not a bundle, and `ParityError` if the bundle does
    not reproduce the predictions of the run in a new process, or if `half` changes them (see `half.measure_parity`); an
    existing bundle is then unchanged.
    """
    run = as_run(run)
    out = Path(out) if out is not None else None
    if not run.metrics:
        raise UsageError(
            f'{run.path}: not evaluated, so it has no threshold and no metrics for its model card. '
            f'Run `{run.evaluation()}` first.'
        )
    check_results(run, main_split(run))
    _, member = split_name(run.recipe.arch)
    check_declared(member)  # the bundle is verified in a new process
    out = out or run / (f'{BUNDLE}.zip' if as_zip else BUNDLE)
    sweep(out)
    check_destination(out, as_zip)
    if as_zip:
        with temporary_folder(out) as folder:
            _build(run, folder, out, half, texts)
            _zip(folder, out)
    else:
        with replaced_folder(out) as folder:
            _build(run, folder, out, half, texts)
    return out


def _build(run: Run, folder: Path, out: Path, half: bool, texts: CardTexts) -> None:
    """Write the bundle of `run` that will be `out` into the empty `folder`, and verify it."""
    with writing(out):
        write_files(run, folder, half, texts)
    verify_in_new_process(folder)


def check_destination(out: Path, as_zip: bool) -> None:
    """Raise `UsageError` if `out` exists and is not a bundle, or if its name does not fit `as_zip`."""
    if as_zip and out.suffix != '.zip':
        raise UsageError(f'--out {out}: with --zip the name must end in .zip.')
    if out.suffix == '.zip' and not as_zip:
        raise UsageError(f'--out {out}: add --zip to write a zip file, or choose a name without .zip.')
    if not out.exists():
        return
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if not is_empty_folder and not _is_only_bundle(out):
        raise UsageError(
            f'{out} is not a bundle, or contains other files too, and was not changed. Choose another --out.'
        )


def _is_only_bundle(path: Path) -> bool:
    """Return True if `path` is a bundle of this version or of schema 1, and contains no other files."""
    if not is_bundle(path):
        return False
    try:
        is_schema_1 = Bundle(path).schema == 1
        if not is_schema_1:
            Bundle.open(path)
    except CXRError:
        return False
    names = _file_names(path)
    if is_schema_1:
        has_required_files = {CONFIG, WEIGHTS, SCHEMA_1_SELFTEST} <= names
        return has_required_files and names <= {*SCHEMA_1_FILES, MANIFEST}
    return names <= {*FILES, MANIFEST}


def _file_names(path: Path) -> set[str]:
    """Return the names of the files in a folder or zip file."""
    if path.is_dir():
        return {file.name for file in path.iterdir()}
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def write_files(run: Run, folder: Path, half: bool = False, texts: CardTexts = PLAIN) -> None:
    """Write the files of the bundle of `run` to `folder`, the manifest last. `half` and `texts` as in `export`."""
    network = Predictor.load(run.path, device='cpu')  # the stored probabilities are those of a processor
    config = network.config
    parity = None
    if half:
        predictor = _write_half(network, folder / ONNX)
        parity = measure_parity(run, network, predictor)
    else:
        predictor = network
        save_weights(network.model, folder / WEIGHTS)
        _write_onnx(network, folder / ONNX)
    selftest = SelfTest.create(predictor.engine, config.size)
    (folder / SELFTEST).write_bytes(tensor_bytes({'images': selftest.images, 'p': selftest.p}))
    samples = read_gate_samples(run, predictor)
    if samples:
        gate = Gate.fit(samples['train'], samples['valid'], HALF_BANK if half else MAX_IMAGES)
        (folder / GATE).write_bytes(tensor_bytes(gate.as_tensors()))
    (folder / CARD).write_text(render_card(run, main_split(run), texts, parity), encoding='utf-8')
    (folder / CONFIG).write_text(_config_text(run, config, parity), encoding='utf-8')
    if not half:
        _write_learner(run, folder, network)
    files = {path.name: {'sha256': sha256(path), 'size': path.stat().st_size} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(manifest_text(files), encoding='utf-8')


def _config_text(run: Run, config: ModelConfig, parity: Parity | None) -> str:
    extra: dict[str, Any] = {
        'normalisation': {'mean': _rounded(MEAN), 'std': _rounded(STD)},
        'intensity': INTENSITY,
        'versions': {name: version(name) for name in VERSIONED_PACKAGES if find_spec(name)},
        'items_sha256': sha256(run / 'items.csv'),
    }
    if parity:
        extra['weights'] = {'stored': 'float16', 'computed': 'float32', **asdict(parity)}
    return config_text(config, **extra)


def _write_half(network: Predictor, path: Path) -> Predictor:
    """Write the ONNX file of `network` with float16 weights to `path` and return its predictor. Raises `CXRError`."""
    require_package('onnx', 'export --half', 'onnx')
    require_package('onnxruntime', 'export --half', 'onnx')
    from cxr_fastai.publishing.onnx import to_onnx

    config = network.config
    data = store_half(to_onnx(network.model, config.size, config.temperature))
    engine = OnnxEngine(data, path, onnx_threads(), config.size)
    path.write_bytes(data)
    return replace(network, engine=engine)


def read_gate_samples(run: Run, predictor: Predictor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return mean features (n, c) and images, grey uint8 (n, s, s), of random images of train and valid of `run`.

    At most `inference.gate.MAX_IMAGES` images of each split are used. If the images are not found, this warns and
    returns an empty dict.
    """
    try:
        return {split: _read_sample(run, predictor, split) for split in ('train', 'valid')}
    except CXRError as error:
        warnings.warn(
            f'the bundle has no input gate, so it will score every image, even one that is not a chest X-ray: {error}',
            CXRWarning,
            stacklevel=4,
        )
        return {}


def _read_sample(run: Run, predictor: Predictor, split: str) -> tuple[np.ndarray, np.ndarray]:
    root, items = find_split(run, None, split)
    items_of_run = own_images(run, split)
    if not set(items.path) <= set(items_of_run.path):
        raise UsageError(f'{root}: not the {split} images of the run. They were in {run.images}; set CXR_DATA.')
    if run.has_out_of_fold:  # the network was trained on all images, so they are divided by patient
        halves = split_patients(items.assign(split='train'), seed=0, valid_pct=0.5)
        items = items[halves.split == split]
    items = items.sample(min(MAX_IMAGES, len(items)), random_state=0)
    images, _ = read_squares(items, root, predictor.preprocessing)
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    features = [predictor.engine(batch)[1] for batch in batches]
    return np.concatenate(features), images


def _write_onnx(predictor: Predictor, path: Path) -> None:
    if find_spec('onnx') is None:
        warnings.warn(
            f'the bundle has no {path.name}, so prediction will use torch: the package onnx is not installed. '
            'Install it and export again: pip install "cxr_fastai[onnx]".',
            CXRWarning,
            stacklevel=4,
        )
        return
    from cxr_fastai.publishing.onnx import to_onnx

    config = predictor.config
    try:
        data = to_onnx(predictor.model, config.size, config.temperature)
        check_onnx(data, path, config.size)
    except CXRError as error:
        warnings.warn(f'the bundle has no {path.name}, so prediction will use torch: {error}', CXRWarning, stacklevel=4)
        return
    path.write_bytes(data)


def _write_learner(run: Run, folder: Path, predictor: Predictor) -> None:
    """Save the learner of the run with the settings of the bundle; it is left out if it cannot be loaded."""
    if not (run / LEARNER).is_file():
        return
    try:
        learn = load_learner(run / LEARNER)
    except CXRError as error:
        warnings.warn(f'the bundle has no {LEARNER}: {error}', CXRWarning, stacklevel=4)
        return
    save_learner(learn, folder / LEARNER, predictor.config)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 6) for value in values.flatten()]


def verify_in_new_process(folder: Path) -> None:
    """Run `verify` in a new process, which shares no state with this one. Raises `ParityError`."""
    # With -P the process imports nothing from the current folder.
    command = [sys.executable, '-P', '-W', 'ignore', '-c', VERIFY_CODE, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return
    lines = process.stderr.strip().splitlines() or [f'exit code {process.returncode}']
    raise ParityError(
        f'{folder.name}: the bundle does not reproduce the predictions of the run in a new process, so nothing was '
        f'exported ({lines[-1]}).'
    )


def verify(path: Path) -> None:
    """Check every file of the bundle `path`, and its reference images with every engine. Raises `CXRError`."""
    bundle = Bundle.open(path)
    for name in bundle.manifest:
        bundle.read(name)
    if bundle.has_weights:
        bundle.selftest.check(bundle.engine('torch'), path)
    if ONNX in bundle and find_spec('onnxruntime'):
        bundle.selftest.check(bundle.engine('onnx'), path)
    engine_kind = 'torch' if bundle.has_weights else 'onnx'
    Predictor.load(path, engine=engine_kind, device='cpu')  # raises if the gate does not fit the network
    if LEARNER in bundle and path.is_dir():
        engine = TorchEngine(read_learner(path / LEARNER).network)
        bundle.selftest.check(engine, path)


def _zip(folder: Path, out: Path) -> None:
    with atomic(out) as temporary:
        with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir()):
                entry = zipfile.ZipInfo(path.name)  # contains neither the date nor the owner of the file
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        with zipfile.ZipFile(temporary) as archive:
            damaged = archive.testzip()
            if damaged:
                raise ParityError(f'{out}: {damaged} was not written correctly. Export again.')
