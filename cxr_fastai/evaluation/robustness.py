"""How a model's AUC holds on images that were corrupted, and on images whose sharpness tells nothing: one table.

Every image is read once and becomes a square of `SIDE` px (more only for a network that sees more); it is corrupted
there, and then goes through the model's own preprocessing. So models of different input size meet the same images. A
network that sees less than `SIDE` px gets its images resampled twice, which `evaluate` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pandas as pd

from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.core.run import Run
from cxr_fastai.evaluation.evaluation import find_split
from cxr_fastai.evaluation.intervals import proportion, roc_auc
from cxr_fastai.images.corruptions import CLEAN, CORRUPTIONS, SHORTCUT, STRENGTHS, Equaliser, corrupt
from cxr_fastai.images.decode import open_image
from cxr_fastai.images.preprocessing import Preprocessing
from cxr_fastai.inference.predictor import Predictor

SIDE = 224
IN_MEMORY = 2**30
"""Bytes of squares above which they are kept in a temporary file."""
COLUMNS = ['corruption', 'strength', 'n', 'auc', 'auc_low', 'auc_high', 'sensitivity', 'specificity']
Variant = Callable[[np.ndarray, str], np.ndarray]
"""A square, grey uint8 (s, s), and its image's path become another square."""


def evaluate_robustness(
    run: Run,
    data: Path | None = None,
    split: str = 'valid',
    batch_size: int = 32,
    limit: int | None = None,
) -> pd.DataFrame:
    """`measure_robustness` of a run on a split, written to its `robustness.csv`, where other splits are kept.

    Raises `UsageError` for a split without images, `ImageError` for an unreadable image.
    """
    root, items = find_split(run, data, split, limit)
    table = measure_robustness(Predictor.load(run.path), items, root, batch_size)
    run.write_split('robustness.csv', table.assign(split=split), split)
    return table


def measure_robustness(
    predictor: Predictor,
    items: pd.DataFrame,
    root: Path,
    batch_size: int = 32,
    seed: int = 0,
    workers: int | None = None,
) -> pd.DataFrame:
    """A row for clean images, for each kind and strength of corruption, and for the images without shortcuts.

    Columns `COLUMNS`: the AUC with DeLong's 95 % interval, sensitivity and specificity at the model's threshold; NaN
    where a class is missing. `items` has the columns path and label, `workers` threads read and corrupt. Raises
    `ImageError` for an unreadable image.
    """
    seen, targs = Preprocessing.of(predictor.config), (items.label == VOCAB[POSITIVE]).to_numpy()
    squares, sides = read_squares(items, root, Preprocessing(max(SIDE, seen.size), seen.resize), workers)
    variants = _variants(Equaliser.of(squares, sides), seed)

    def make(job: tuple[Variant, int]) -> np.ndarray:
        variant, image = job
        return seen.fit(variant(squares[image], items.path.iloc[image]))

    jobs = [(variant, image) for variant in variants.values() for image in range(len(items))]
    images = in_threads(make, jobs, workers)
    scores = np.concatenate([predictor.scores(batch) for batch in _batches(images, batch_size)])
    rows = zip(variants, scores.reshape(len(variants), -1), strict=True)
    return pd.DataFrame([_row(*name, targs, p, predictor.config.threshold) for name, p in rows], columns=COLUMNS)


def read_squares(
    items: pd.DataFrame,
    root: Path,
    preprocessing: Preprocessing,
    workers: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The images of `items` as uint8 (n, side, side), in a temporary file where memory would be short, and the shorter
    sides (n,) of their files in pixels. Raises `ImageError` for an unreadable image."""
    shape = (len(items), preprocessing.size, preprocessing.size)
    if np.prod(shape) <= IN_MEMORY:
        squares = np.empty(shape, np.uint8)
    else:
        with TemporaryFile() as file:
            squares = np.memmap(file, np.uint8, shape=shape)  # which keeps the file
    sides = np.empty(len(items), int)
    read = in_threads(partial(_read, preprocessing=preprocessing), [root / path for path in items.path], workers)
    for i, (square, side) in enumerate(read):
        squares[i], sides[i] = square, side
    return squares, sides


def _read(path: Path, preprocessing: Preprocessing) -> tuple[np.ndarray, int]:
    image = open_image(path, preprocessing)
    return preprocessing.fit(image.pixels), min(image.width, image.height)


def _variants(equaliser: Equaliser, seed: int) -> dict[tuple[str, int], Variant]:
    """What to do to an image, by corruption and strength."""
    corrupted = {
        (kind, strength): partial(_corrupted, kind=kind, strength=strength, seed=seed)
        for kind in CORRUPTIONS
        for strength in STRENGTHS
    }
    return {(CLEAN, 0): _unchanged, **corrupted, (SHORTCUT, 0): partial(_equalised, equaliser=equaliser)}


def _unchanged(square: np.ndarray, path: str) -> np.ndarray:
    return square


def _corrupted(square: np.ndarray, path: str, kind: str, strength: int, seed: int) -> np.ndarray:
    return corrupt(square, kind, strength, path, seed)


def _equalised(square: np.ndarray, path: str, equaliser: Equaliser) -> np.ndarray:
    return equaliser(square)


def _batches(images: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    while batch := list(islice(images, size)):
        yield np.stack(batch)


def _row(corruption: str, strength: int, targs: np.ndarray, p: np.ndarray, threshold: float) -> dict[str, Any]:
    auc, called = roc_auc(targs, p), p >= threshold
    right = {
        name: proportion(int((called[side] == positive).sum()), int(side.sum()))['value']
        for name, side, positive in (('sensitivity', targs, True), ('specificity', ~targs, False))
    }
    row = {'auc': auc['value'], 'auc_low': auc['low'], 'auc_high': auc['high'], **right}
    return {
        'corruption': corruption,
        'strength': strength,
        'n': len(targs),
        **{name: np.nan if value is None else value for name, value in row.items()},
    }
