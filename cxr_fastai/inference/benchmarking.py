"""The speed of a model on this machine: images per second by engine, device, precision and batch size.

Only the network is timed, on images that are decoded already.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.progress import ShownProgress
from cxr_fastai.inference.bundle import Bundle, is_bundle
from cxr_fastai.inference.engines import PRECISIONS
from cxr_fastai.inference.onnx_start import ONNX
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.pretrained import find_model
from cxr_fastai.inference.selftest import draw_images

BATCH_SIZES = (1, 8, 32)
ROUNDS = 9
"""Timed batches of each setting. They alternate, and the fastest counts: other programs can only slow a batch down."""
MAX_IMAGES = 64
"""Images whose probabilities are compared."""
COLUMNS = ('engine', 'device', 'precision', 'batch_size', 'images_per_second', 'milliseconds', 'largest_change')


@dataclass(frozen=True)
class Setting:
    """How a model is run: the `engine`, `device` and `precision` of `Predictor.load`."""

    engine: str
    device: str
    precision: str

    def load(self, model: Path, modality: str) -> Predictor:
        """Load `model` with this setting."""
        return Predictor.load(
            model,
            engine=self.engine,
            gate=False,
            device=self.device,
            precision=self.precision,
            modality=modality,
        )


REFERENCE = Setting('torch', 'cpu', 'fp32')
"""The setting whose probabilities the others are compared with, if the model has weights for torch."""


def benchmark(
    model: StrPath,
    images: Sequence[StrPath] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    rounds: int = ROUNDS,
    modality: str = '',
) -> list[dict[str, Any]]:
    """Measure the network of the run, bundle or trusted learner `model` with each setting that this machine has.

    Args:
        images: files that are predicted; by default synthetic images. Files that cannot be used are left out.
        batch_sizes: numbers of images that are predicted at once.
        rounds: timed batches of each setting and size.
        modality: DICOM modalities that are accepted besides those of the training.

    Returns:
        A row with the keys `COLUMNS` for each setting and size: the rate and time of the fastest batch, and the largest
        change of a probability of the images compared with torch in fp32 on the processor, or with ONNX Runtime if the
        bundle has no weights for torch.

    Raises `CXRError` if the model cannot be loaded, or if no image can be used.
    """
    model = find_model(model)
    predictors = {setting: setting.load(model, modality) for setting in find_settings(model)}
    reference = next(iter(predictors.values()))
    squares = _read_squares(reference, [Path(image) for image in images[:MAX_IMAGES]])
    expected = reference.scores(squares)
    changes = {
        name: float(np.abs(predictor.scores(squares) - expected).max()) for name, predictor in predictors.items()
    }
    rows = []
    shown = ShownProgress(len(batch_sizes) * (rounds + 1) * len(predictors), 'benchmark', unit='batch')
    for size in batch_sizes:
        batch = np.resize(squares, (size, *squares.shape[1:]))
        seconds: dict[Setting, list[float]] = {setting: [] for setting in predictors}
        for _ in range(rounds + 1):
            for setting, predictor in predictors.items():
                start = time.perf_counter()
                predictor.scores(batch)
                seconds[setting].append(time.perf_counter() - start)
                shown.update(size)
        rows += [_make_row(setting, size, times[1:], changes[setting]) for setting, times in seconds.items()]
    shown.close()
    return rows


def find_settings(model: Path) -> list[Setting]:
    """Return the settings with which `model` can be run on this machine; the others are compared with the first."""
    from cxr_fastai.models.devices import choose_device

    onnx = Setting('onnx', 'cpu', 'fp32')
    if is_bundle(model) and not Bundle.open(model).has_weights:
        return [onnx]
    devices = dict.fromkeys(['cpu', str(choose_device('auto'))])
    settings = [Setting('torch', device, precision) for device in devices for precision in PRECISIONS]
    if is_bundle(model) and ONNX in Bundle.open(model) and find_spec('onnxruntime'):
        settings.append(onnx)
    return settings


def _read_squares(predictor: Predictor, images: Sequence[Path]) -> np.ndarray:
    """Return the images as the network of `predictor` sees them, (n, size, size); synthetic ones if there are none."""
    if not images:
        return draw_images(predictor.config.size)
    squares = []
    problem = None
    for path in images:
        try:
            squares.append(predictor.preprocessing.load(path))
        except ImageError as error:
            problem = error
    if not squares and problem:
        raise problem
    return np.stack(squares)


def _make_row(setting: Setting, size: int, seconds: Sequence[float], change: float) -> dict[str, Any]:
    fastest = min(seconds)
    values = (setting.engine, setting.device, setting.precision, size, size / fastest, 1000 * fastest, change)
    return dict(zip(COLUMNS, values, strict=True))
