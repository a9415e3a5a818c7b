"""Measure images without a network: how they are stored, how they look, and which are nearly identical."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from cxr_fastai.core.errors import ImageError
from cxr_fastai.core.progress import in_threads
from cxr_fastai.images.corruptions import sharpness
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.decoder_pool import DecodeGroup, default_pool
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
"""Properties that should be unrelated to a disease.

Grey levels and sharpness (the mean difference between neighbouring pixels) are those of the image resized to 224 px, as
a network sees it. The border is the outer 5% of each side.
"""
MEASUREMENTS = ['format', 'mode', 'bits', 'bytes', 'digest', 'burned_in', 'code', *TRAITS]
"""The columns of `measure_images`."""
COLOUR_MODES = ('RGB', 'RGBA', 'RGBX', 'RGBa', 'CMYK', 'YCbCr', 'P', 'PA')
"""Pillow's modes that can store colour, even if the image is grey."""
NETWORK_SIZE = 224
BORDER = 0.05
THUMBNAIL_SIZE = 32
MIN_CORRELATION = 0.995
"""Correlation of two thumbnails from which the images count as duplicates. In the real data set duplicates are above
0.999, and no pair lies between 0.985 and 0.999."""
MAX_PAIRS = 100_000
BLOCK = 2048
"""Number of images compared with as many others at a time; their correlations need 16 MB."""


def measure_images(
    paths: Sequence[str], root: Path, workers: int | None = None, modality: str = ''
) -> tuple[pd.DataFrame, np.ndarray]:
    """Measure the images `paths` below the folder `root`, with `workers` threads (default: the number of cores).

    Returns a table with a row for each image and the columns `MEASUREMENTS`, and thumbnails, uint8 (n, 32, 32).
    `digest` is a hash of the decoded pixels. `modality` has the codes of other DICOM modalities to accept. For an
    unusable image only `code`, its error code, is set, and its thumbnail is black.
    """
    with DecodeGroup(default_pool()) as group:
        results = list(in_threads(partial(_measure, group, modality), [root / path for path in paths], workers))
    table = pd.DataFrame([measurements for measurements, _ in results], columns=MEASUREMENTS)
    return table, np.stack([thumbnail for _, thumbnail in results])


def _measure(group: DecodeGroup, modality: str, path: Path) -> tuple[dict[str, Any], np.ndarray]:
    try:
        image = open_image(path, decode=group.decode, modality=modality)
    except ImageError as error:
        return {'code': error.code}, np.zeros((THUMBNAIL_SIZE, THUMBNAIL_SIZE), np.uint8)
    n_bytes = path.stat().st_size
    shape = str(image.pixels.shape).encode()
    stored = {
        'format': image.format,
        'mode': image.mode,
        'bits': image.bits,
        'width': image.width,
        'height': image.height,
        'bytes': n_bytes,
        'digest': hashlib.blake2b(image.pixels.tobytes() + shape, digest_size=16).hexdigest(),
        'burned_in': image.burned_in,
        'code': None,
        'aspect': image.width / image.height,
        'colour': float(image.mode in COLOUR_MODES),
        'bytes per pixel': n_bytes / (image.width * image.height),
    }
    square = Preprocessing(NETWORK_SIZE).fit(image.pixels).astype(np.float32)
    thumbnail = Image.fromarray(image.pixels).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), BILINEAR)
    return stored | _measure_look(square), np.asarray(thumbnail)


def _measure_look(square: np.ndarray) -> dict[str, float]:
    edge = round(BORDER * len(square))
    inner = square[edge:-edge, edge:-edge]
    vertical, horizontal = sharpness(square)
    return {
        'mean grey': float(square.mean()),
        'border grey': float((square.sum() - inner.sum()) / (square.size - inner.size)),
        'vertical sharpness': vertical,
        'horizontal sharpness': horizontal,
    }


def find_duplicates(
    thumbnails: np.ndarray, min_correlation: float = MIN_CORRELATION, block: int = BLOCK, max_pairs: int = MAX_PAIRS
) -> list[tuple[int, int, float]]:
    """Return pairs i < j of `thumbnails`, uint8 (n, h, w), with a correlation of at least `min_correlation`.

    Each pair comes with its Pearson correlation over the pixels. At most `max_pairs` are returned. `block` thumbnails
    are compared with `block` others at a time. A thumbnail of one grey level correlates with no other.
    """
    rows = _standardise(thumbnails)
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(rows), block):
        for other in range(start, len(rows), block):
            products = rows[start : start + block] @ rows[other : other + block].T
            pairs += _similar_pairs(products, start, other, min_correlation)
            if len(pairs) >= max_pairs:
                return pairs[:max_pairs]
    return pairs


def _standardise(thumbnails: np.ndarray) -> np.ndarray:
    """Return the thumbnails as float32 rows of mean 0 and length 1; the product of two rows is their correlation."""
    rows = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    lengths = np.sqrt(np.einsum('ij,ij->i', rows, rows))[:, None]  # np.linalg.norm would need twice the memory
    rows /= np.where(lengths > 0, lengths, 1)
    return rows


def _similar_pairs(
    products: np.ndarray, start: int, other: int, min_correlation: float
) -> Iterator[tuple[int, int, float]]:
    """Yield the pairs of a block of correlations: row 0 is the thumbnail `start`, column 0 the thumbnail `other`."""
    rows, columns = np.nonzero(products >= min_correlation)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        i, j = start + row, other + column
        if i < j:
            yield i, j, min(1.0, float(products[row, column]))
