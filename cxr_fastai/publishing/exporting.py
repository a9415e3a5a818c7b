"""A run becomes a bundle: written beside its place, predicted with in a fresh process, and only then put there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.files import atomic, sync, writing
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import find_split
from cxr_fastai.evaluation.intervals import roc_auc
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.bundle import (
    CANARY,
    CARD,
    CONFIG,
    FILES,
    GATE,
    INT8,
    MANIFEST,
    ONNX,
    SCHEMA,
    Bundle,
    manifest_text,
)
from cxr_fastai.inference.config import LEARNER, WEIGHTS, config_text, save_weights, sha256, tensor_bytes
from cxr_fastai.inference.engines import OnnxEngine, TorchEngine
from cxr_fastai.inference.gate import IMAGES, Gate
from cxr_fastai.inference.pickles import load_learner, save_learner
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.selftest import Canary, Engine, ParityError
from cxr_fastai.models.inputs import MEAN, STD
from cxr_fastai.publishing.model_card import render_card
from cxr_fastai.publishing.reporting import SPLITS

PACKAGES = ('cxr_fastai', 'torch', 'safetensors', 'onnxruntime')
FRESH = 'import sys; from pathlib import Path; from cxr_fastai.publishing.exporting import verify; verify(Path(sys.argv[1]))'
BATCH, CALIBRATION = 32, 128
"""Images that go through the network at once; training images that show an 8-bit network how large numbers get."""
MOST_CHANGE = 0.002
"""The change of AUC from which on an 8-bit network is not kept."""
INTENSITY = (
    '8 bits as they are; deeper images through the window that they declare, else from the 0.5th to the 99.5th '
    'percentile'
)


@dataclass(frozen=True)
class Known:
    """Images of a split, grey uint8 (n, s, s), whether each shows pneumonia (n,), and what the network says of them:
    probabilities (n,) and features (n, c)."""

    images: np.ndarray
    targs: np.ndarray
    p: np.ndarray
    features: np.ndarray


def export(run: Run, out: Path | None = None, as_zip: bool = False, int8: bool = False) -> Path:
    """Write the bundle of `run` to `out` (default: `bundle/` in the run), in the place of one that was there, and
    return its path; `as_zip` makes one file of it, and `out` ends in .zip then; with `int8` it gets an 8-bit ONNX file
    too, if that is as good.

    Raises `UsageError` where the run was not evaluated, `ParityError` where the bundle does not predict in a fresh
    process what the run does; an old bundle is whole then.
    """
    if not run.metrics:
        raise UsageError(
            f'{run.path}: not evaluated, so it has no threshold and no figures for its card: `cxr-fastai '
            f'evaluate {run.path}` first.'
        )
    if int8 and not find_spec('onnx'):
        raise UsageError('--int8 needs pip install "cxr_fastai[onnx]".')
    out = out or run / ('bundle.zip' if as_zip else 'bundle')
    check_place(out, as_zip)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(f'.{out.name}.{os.getpid()}.made')  # not .tmp, which `atomic` calls the zip while it grows
    try:
        with writing(out):
            made.mkdir()
            fill_bundle(run, made, int8)
            for file in made.iterdir():
                sync(file)
        verify_afresh(made)
        if as_zip:
            _zip(made, out)
        else:
            _swap(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return out


def check_place(out: Path, as_zip: bool) -> None:
    """Raise `UsageError` where `out` is something else than a bundle, or does not end in .zip where it should."""
    if as_zip != (out.suffix == '.zip'):
        raise UsageError(f'--out {out}: --zip and a name that ends in .zip go together.')
    if out.exists() and not (_is_bundle(out) or out.is_dir() and not any(out.iterdir())):
        raise UsageError(f'{out} is no bundle, and was left alone: choose another --out.')


def _is_bundle(out: Path) -> bool:
    """Whether `out` is a bundle and nothing else."""
    try:
        Bundle.open(out)
    except CXRError:
        return False
    return not out.is_dir() or {path.name for path in out.iterdir()} <= {*FILES, MANIFEST}


def fill_bundle(run: Run, folder: Path, int8: bool = False) -> None:
    """Write the files of the bundle of `run` into `folder`, the manifest last."""
    predictor = Predictor.load(run.path)
    config, known, more = predictor.config, read_known(run, predictor), {}
    save_weights(predictor.model, folder / WEIGHTS)
    canary = Canary.of(predictor.engine, config.size)
    tensors = {'images': canary.images, 'p': canary.p}
    if known:
        gate = Gate.fit(*((split.features, split.images) for split in known.values()))
        (folder / GATE).write_bytes(tensor_bytes(gate.as_tensors()))
    if find_spec('onnx'):
        from cxr_fastai.publishing.onnx import to_onnx

        (folder / ONNX).write_bytes(data := to_onnx(predictor.model, config.size, config.temperature))
        if int8 and known:
            more['int8'] = _write_int8(folder, data, known, tensors)
    (folder / CANARY).write_bytes(tensor_bytes(tensors))
    split = next(split for split in SPLITS if split in run.metrics)
    (folder / CARD).write_text(render_card(run, split), encoding='utf-8')
    (folder / CONFIG).write_text(
        config_text(
            config,
            schema=SCHEMA,
            normalisation={'mean': _digits(MEAN), 'std': _digits(STD)},
            intensity=INTENSITY,
            versions=_versions(),
            items_sha256=sha256(run / 'items.csv'),
            **more,
        ),
        encoding='utf-8',
    )
    _copy_learner(run, folder, predictor)
    files = {path.name: {'sha256': sha256(path), 'size': path.stat().st_size} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(manifest_text(files), encoding='utf-8')


def read_known(run: Run, predictor: Predictor) -> dict[str, Known]:
    """Up to `IMAGES` images of train and of valid of `run`, by chance; none, with a warning, where they are gone."""
    try:
        return {split: _know(run, predictor, split) for split in ('train', 'valid')}
    except CXRError as error:
        warnings.warn(f'no input gate, so any picture gets a probability: {error}', CXRWarning, stacklevel=4)
        return {}


def verify_afresh(folder: Path) -> None:
    """Run `verify` in a new process, which shares nothing with this one. Raises `ParityError`."""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', FRESH, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise ParityError(
            f'{folder.name}: the bundle does not predict in a fresh process what the run '
            f'does, so nothing was exported ({_last(done)}).'
        )


def _last(done: subprocess.CompletedProcess) -> str:
    return (done.stderr.strip().splitlines() or [f'it ended with {done.returncode}'])[-1]


def verify(path: Path) -> None:
    """Read every file of the bundle `path`, and predict the canary images with every engine that it has. Raises
    `CXRError`."""
    bundle = Bundle.open(path)
    for name in bundle.manifest:
        bundle.read(name)
    runtime = find_spec('onnxruntime')
    kinds = {'torch': WEIGHTS, 'onnx': ONNX} if runtime else {'torch': WEIGHTS}
    for kind, name in kinds.items():
        if name in bundle:
            bundle.canary.check(bundle.engine(kind), path, threshold=bundle.config.threshold)
    if INT8 in bundle and runtime:
        bundle.canary_of('int8').check(bundle.engine('int8'), path)
    Predictor.load(path, engine='torch')  # which sees whether the gate fits
    if LEARNER in bundle and path.is_dir():
        bundle.canary.check(TorchEngine(load_learner(path / LEARNER).model), path, threshold=bundle.config.threshold)


def _know(run: Run, predictor: Predictor, split: str) -> Known:
    root, items = find_split(run, None, split)
    if not set(items.path) <= set(run.items[run.items.split == split].path):
        raise UsageError(f'{root}: not the {split} images of the run, which were in {run.images}.')
    items = items.sample(min(IMAGES, len(items)), random_state=0)
    images = read_squares(items, root, Preprocessing.of(predictor.config))[0]
    p, features = _run(predictor.engine, images)
    return Known(images, (items.label == VOCAB[POSITIVE]).to_numpy(), p, features)


def _run(engine: Engine, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, features = zip(*(engine(images[start : start + BATCH]) for start in range(0, len(images), BATCH)), strict=True)
    return np.concatenate(p), np.concatenate(features)


def _write_int8(folder: Path, data: bytes, known: dict[str, Known], tensors: dict[str, np.ndarray]) -> dict[str, float]:
    """Write the 8-bit file and its canary, unless it is worse on validation images; returns what was measured."""
    from cxr_fastai.publishing.quantise import to_int8

    valid, rng = known['valid'], np.random.default_rng(0)
    few = rng.permutation(len(known['train'].images))[:CALIBRATION]
    small = to_int8(data, known['train'].images[few])
    engine = OnnxEngine(small, folder / INT8)
    before, after = (roc_auc(valid.targs, p)['value'] for p in (valid.p, _run(engine, valid.images)[0]))
    change = None if before is None else round(after - before, 5)
    if change is None or abs(change) >= MOST_CHANGE:
        warnings.warn(
            f'no {INT8} in the bundle: it changes the AUC on validation images by {change}, and less than '
            f'{MOST_CHANGE} is asked.',
            CXRWarning,
            stacklevel=5,
        )
    else:
        (folder / INT8).write_bytes(small)
        tensors['p_int8'] = engine(tensors['images'])[0]
    return {'auc_valid': before, 'auc_change': change}


def _copy_learner(run: Run, folder: Path, predictor: Predictor) -> None:
    if not (run / LEARNER).is_file():
        return
    try:
        learn = load_learner(run / LEARNER)
    except CXRError as error:  # of a network that our list does not know, or not trusted
        warnings.warn(f'no {LEARNER} in the bundle: {error}', CXRWarning, stacklevel=4)
        return
    save_learner(learn, folder / LEARNER, predictor.config)


def _digits(numbers: torch.Tensor) -> list[float]:
    return [round(number, 6) for number in numbers.flatten().tolist()]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES if find_spec(name)}


def _swap(made: Path, out: Path) -> None:
    """Put the folder `made` in the place of `out`."""
    old = out.with_name(f'.{out.name}.{os.getpid()}.old')
    with writing(out):
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(made, out)
        except BaseException:  # a signal as well
            if old.exists():
                os.replace(old, out)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _zip(made: Path, out: Path) -> None:
    with atomic(out) as temporary, zipfile.ZipFile(temporary, 'w', zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(made.iterdir()):
            entry = zipfile.ZipInfo(path.name)  # whose date is fixed, and whose owner is nobody
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        archive.close()
        with zipfile.ZipFile(temporary) as written:
            if broken := written.testzip():
                raise ParityError(f'{out}: {broken} was written wrongly: export again.')
