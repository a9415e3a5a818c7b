"""Weights of an ONNX file in half the space: stored as float16, computed in float32, and compared with the network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr_fastai.core.environment import require_package
from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.robustness import read_squares
from cxr_fastai.evaluation.split_images import find_split
from cxr_fastai.inference.predictor import Predictor
from cxr_fastai.inference.selftest import ParityError

MIN_VALUES = 20_000
"""Smallest number of values of a tensor that is stored as float16. Smaller ones, such as those of the first layers,
cause most of the change, and take 0.4 MB more in float32. On 1,744 validation images of EfficientNet-Lite0, the largest
change is 9.5e-4 if those from 5,000 values on are stored as float16."""
MAX_CHANGE = 1e-3
"""Largest change of a probability by the storage as float16."""
HALF_BANK = 120
"""Number of training images whose features the input gate of such a bundle contains; 800 would take 2 MB."""
BATCH_SIZE = 32
SUFFIX = '_float16'
"""End of the name of a tensor that is stored as float16."""


def store_half(data: bytes) -> bytes:
    """Return the ONNX file `data` with its large float32 tensors stored as float16.

    A Cast to float32 follows each of them, so that every computation is in float32, as before. ONNX Runtime computes
    these casts once, when it loads the file. Tensors with values that float16 cannot express (above 65,504, NaN or
    infinite) and those of fewer than `MIN_VALUES` values are unchanged. Raises `UsageError` without the package onnx.
    """
    require_package('onnx', 'export --half', 'onnx')
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_from_string(data)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if not _fits_half(values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name + SUFFIX))
        casts.append(helper.make_node('Cast', [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    graph.ClearField('node')
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _fits_half(values: np.ndarray) -> bool:
    return values.size >= MIN_VALUES and bool((np.abs(values) <= np.finfo(np.float16).max).all())


@dataclass(frozen=True)
class Parity:
    """What float16 changes: the `largest_change` of a probability of the `images` of a `split`; no decision changes."""

    split: str
    images: int
    largest_change: float


def measure_parity(run: Run, network: Predictor, half: Predictor) -> Parity:
    """Compare `half`, the network of `run` stored as float16, with its own `network` on the validation images.

    A run without validation images is compared on its training images. Raises `ParityError` if a probability changes by
    more than `MAX_CHANGE`, or if an image is classified differently; `UsageError` if the images are not found.
    """
    split = 'valid' if (run.items.split == 'valid').any() else 'train'
    try:
        root, items = find_split(run, None, split)
    except CXRError as error:
        raise UsageError(f'--half compares probabilities on the {split} images, but {error}') from None
    images, _ = read_squares(items, root, network.preprocessing)
    expected, actual = _predict(network, images), _predict(half, images)
    change = float(np.abs(actual - expected).max())
    threshold = network.config.threshold
    changed = int(((actual >= threshold) != (expected >= threshold)).sum())
    if not change <= MAX_CHANGE or changed:
        raise ParityError(
            f'{run.path}: stored as float16, the network classifies {changed} of {len(items)} {split} images '
            f'differently, and a probability changes by {change:.2g} (at most {MAX_CHANGE:g} is permitted), so nothing '
            'was exported. Export without --half.'
        )
    return Parity(split, len(items), change)


def _predict(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    """Return the probabilities (n,) of grey uint8 images (n, s, s)."""
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([predictor.scores(batch) for batch in batches])
