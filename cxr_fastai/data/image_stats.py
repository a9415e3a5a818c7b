"""What simple numbers tell about images without a network: how they are stored, how they look, which are alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.progress import in_threads
from cxr_fastai.images.corruptions import sharpness
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import BILINEAR, Preprocessing

TRAITS = (
    'width',
    'height',
    'aspect',
    'colour',
    'bytes per pixel',
    'mean grey',
    'border grey',
    'vertical sharpness',
    'horizontal sharpness',
)
"""Numbers that should tell nothing about a disease. Grey levels and sharpness (the mean step between neighbouring
pixels) are those of the image squished to 224 px, as a network sees it; the border is its outer 5 %."""
COLUMNS = ['format', 'mode', 'bits', 'bytes', 'digest', 'burned_in', 'code', *TRAITS]
COLOUR = ('RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK', 'YCbCr', 'P', 'PA')
"""Modes that could hold colour, whatever they do hold."""
THUMBNAIL = 32
ALIKE = 0.995
"""Correlation of two thumbnails from which on they show the same image. On the real set copies lie above .999, and
nothing between .985 and that."""
MOST_PAIRS = 100_000
BLOCK = 2048
"""Images compared with as many others at a time: 16 MB of correlations."""


def measure_images(paths: Sequence[str], root: Path, workers: int | None = None) -> tuple[pd.DataFrame, np.ndarray]:
    """A row for each of the images `paths` below `root`, in their order, and their thumbnails: uint8 (n, 32, 32).

    Columns: `format mode bits width height bytes digest burned_in`, those of `TRAITS`, and `code`; an image that cannot
    be used has only its code. `digest` is a hash of the decoded pixels. `workers` threads read (default: the cores).
    """
    measured = list(in_threads(_measure, [root / path for path in paths], workers))
    table = pd.DataFrame([traits for traits, _ in measured], columns=COLUMNS)
    return table, np.stack([thumbnail for _, thumbnail in measured])


def find_alike(thumbnails: np.ndarray, alike: float = ALIKE) -> list[tuple[int, int, float]]:
    """Pairs i < j of `thumbnails` uint8 (n, h, w) whose correlation (Pearson's, over the pixels) is at least `alike`,
    and the correlation, by blocks of matrix products; the first `MOST_PAIRS`. Blank ones are like nothing."""
    unit, pairs = _unit(thumbnails), []
    for start in range(0, len(unit), BLOCK):
        for other in range(start, len(unit), BLOCK):
            pairs += _pairs(unit, start, other, alike)
            if len(pairs) >= MOST_PAIRS:
                return pairs[:MOST_PAIRS]
    return pairs


def _pairs(unit: np.ndarray, start: int, other: int, alike: float) -> Iterator[tuple[int, int, float]]:
    products = unit[start : start + BLOCK] @ unit[other : other + BLOCK].T
    i, j = np.nonzero(products >= alike)
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        if start + a < other + b:
            yield start + a, other + b, min(1.0, float(products[a, b]))


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """The thumbnails as rows of mean 0 and length 1, in 32 bits: a product of two rows is their correlation."""
    unit = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    unit -= unit.mean(axis=1, keepdims=True)
    lengths = np.sqrt(np.einsum('ij,ij->i', unit, unit))[:, None]  # norm() would need as much memory again
    unit /= np.where(lengths > 0, lengths, 1)
    return unit


def _measure(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    try:
        image = open_image(path)
    except ImageError as error:
        return {'code': error.code}, np.zeros((THUMBNAIL, THUMBNAIL), np.uint8)
    size = path.stat().st_size
    digest = hashlib.blake2b(image.pixels.tobytes() + str(image.pixels.shape).encode(), digest_size=16).hexdigest()
    thumbnail = np.asarray(Image.fromarray(image.pixels).resize((THUMBNAIL, THUMBNAIL), BILINEAR))
    facts = {
        'format': image.format,
        'mode': image.mode,
        'bits': image.bits,
        'width': image.width,
        'height': image.height,
        'bytes': size,
        'digest': digest,
        'burned_in': image.burned_in,
        'code': None,
        'aspect': image.width / image.height,
        'colour': float(image.mode in COLOUR),
        'bytes per pixel': size / (image.width * image.height),
    }
    return facts | _look(Preprocessing(224).fit(image.pixels).astype(np.float32)), thumbnail


def _look(seen: np.ndarray) -> dict[str, float]:
    edge = round(0.05 * len(seen))
    inner = seen[edge:-edge, edge:-edge]
    vertical, horizontal = sharpness(seen)
    return {
        'mean grey': float(seen.mean()),
        'border grey': float((seen.sum() - inner.sum()) / (seen.size - inner.size)),
        'vertical sharpness': vertical,
        'horizontal sharpness': horizontal,
    }
