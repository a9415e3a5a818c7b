"""Hold out the softest normal images: the split `shift`, which imitates images of other days.

The normal images of the official test split have less fine detail than those of the training images, and networks take
them for pneumonia. A validation split of random patients cannot show that, because its images are those of the same
days. So the normal patients with the least detail are held out of training, and with them random patients with
pneumonia. A network meets in them what it has not seen in training: normal images that are soft.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.core.progress import in_threads
from cxr_fastai.core.recipe import POSITIVE, SHIFT, VOCAB
from cxr_fastai.data.splits import describe_counts
from cxr_fastai.images.cache import ImageCache, find_cache
from cxr_fastai.images.corruptions import sharpness
from cxr_fastai.images.preprocessing import Preprocessing

DETAIL_SIZE = 224
"""Side of the squares, in pixels, whose detail is measured."""
PNEUMONIA_SEED = 0
"""Seed of the choice of the patients with pneumonia. It is fixed, so that runs of any seed have the same images."""


def hold_out_soft(items: pd.DataFrame, root: Path, share: float, modality: str = '') -> pd.DataFrame:
    """Return `items` with the softest `share` of the normal patients of train and valid in the split `shift`.

    The same share of the patients with pneumonia, drawn at random among those without normal images, joins them. All
    images of a patient are held out together. The softness of a patient is the mean `detail` of the normal images,
    which are below the folder `root`; no network and no seed of a training decides about it. `modality` has the codes
    of other DICOM modalities to accept.

    Raises `UsageError` if a class has too few patients to hold out one and to keep two.
    """
    pool = items[items.split.isin(['train', 'valid'])]
    patients = pool.groupby('label').patient.nunique().reindex(VOCAB, fill_value=0)
    numbers = (patients * share).round().astype(int)
    if (numbers < 1).any() or (patients - numbers < 2).any():
        raise UsageError(
            f'shift_pct {share:g}: at least one patient of each class has to be held out and two have to stay; found '
            f'{describe_counts(patients)} patients. Choose another share, or add images.'
        )
    normal = pool[pool.label == VOCAB[1 - POSITIVE]]
    pneumonia = pool[~pool.patient.isin(normal.patient)]
    details = pd.Series(measure_detail(normal.path.to_list(), root, modality), normal.index)
    softest = details.groupby(normal.patient).mean().sort_values(kind='stable').index[: numbers.iloc[0]]
    shuffled = np.random.default_rng(PNEUMONIA_SEED).permutation(np.sort(pneumonia.patient.unique()))
    drawn = shuffled[: numbers.iloc[POSITIVE]]
    held_out = pool.index[pool.patient.isin([*softest, *drawn])]
    return items.assign(split=items.split.where(~items.index.isin(held_out), SHIFT))


def measure_detail(paths: Sequence[str], root: Path, modality: str = '') -> np.ndarray:
    """Return the `detail` (n,) of the images `paths` below the folder `root`; NaN for unreadable images."""
    preprocessing = Preprocessing(DETAIL_SIZE, modality=modality)
    source = find_cache(root, preprocessing) or preprocessing
    return np.array(list(in_threads(partial(_measure, source), [root / path for path in paths])))


def _measure(source: ImageCache | Preprocessing, path: Path) -> float:
    try:
        return detail(source.load(path))
    except ImageError:
        return float('nan')


def detail(square: np.ndarray) -> float:
    """Return the mean difference between neighbouring pixels of `square`, grey uint8 (s, s), in grey levels.

    Over the normal training images of the data set, it is unrelated to their brightness and contrast: Spearman's
    correlation with the mean grey level is -0.01 and with the standard deviation 0.07. Divided by the standard
    deviation it would be -0.54, so contrast would be chosen instead of detail.
    """
    return float(np.mean(sharpness(square)))
