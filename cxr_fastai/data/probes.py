"""Probes of the properties of image files: whether one of them alone tells the label, or the split, of an image."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.data.image_stats import TRAITS

SHORTCUT_AUC = 0.70
"""Cross-validated AUC of a single property above which a warning is given."""
MIN_PROBED = 20
"""Images, and patients, that each of two groups must have to be compared; with fewer, chance gives high AUCs."""
FOLDS = 5
LABEL = 'label'
"""The name of the probe that separates the classes; the other probes separate two splits."""
ANATOMY = 'label, by a network'
"""The name of the probe of `anatomy_probe`, which separates the classes by images without their lungs."""


def probe_label(images: pd.DataFrame) -> pd.DataFrame:
    """Return the AUC of each of `TRAITS` for the label: columns `probe trait auc`, the highest AUC first.

    `images` has the columns `split label patient` and the traits. Train images are used if they are enough of both
    classes, else all images. The result is empty if there are too few.
    """
    for group in (images[images.split == 'train'], images):
        probes = _probe(LABEL, group, (group.label == VOCAB[POSITIVE]).to_numpy())
        if len(probes):
            break
    return probes


def probe_shift(images: pd.DataFrame) -> pd.DataFrame:
    """Return the AUC of each of `TRAITS` for separating train from valid and from test within a class.

    The columns are `probe trait auc`. A property that differs between splits makes valid a poor guide to the test
    result.
    """
    probes = []
    for label in VOCAB:
        for other in ('valid', 'test'):
            group = images[(images.label == label) & images.split.isin(['train', other])]
            probes.append(_probe(f'train and {other}, {label}', group, (group.split == other).to_numpy()))
    return pd.concat(probes, ignore_index=True)


def _probe(name: str, images: pd.DataFrame, targs: np.ndarray) -> pd.DataFrame:
    """Return the columns `probe trait auc` for the boolean `targs` (n,) of the images."""
    rows = []
    if _enough(images, targs) and _enough(images, ~targs):
        folds = assign_folds(images, targs)
        for trait in TRAITS:
            if images[trait].nunique() > 1:
                rows.append((name, trait, _cross_validated_auc(images[trait].to_numpy(float), targs, folds)))
    table = pd.DataFrame(rows, columns=['probe', 'trait', 'auc'])
    return table.sort_values('auc', ascending=False, kind='stable', ignore_index=True)


def _enough(images: pd.DataFrame, mask: np.ndarray) -> bool:
    return mask.sum() >= MIN_PROBED and images.patient[mask].nunique() >= MIN_PROBED


def assign_folds(images: pd.DataFrame, targs: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Return the number of the fold (n,) of each image; the images of a patient are in the same fold."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    numbers = np.empty(len(images), int)
    for number, (_, held_out) in enumerate(splitter.split(images, targs, images.patient.to_numpy())):
        numbers[held_out] = number
    return numbers


def _cross_validated_auc(values: np.ndarray, targs: np.ndarray, folds: np.ndarray) -> float:
    """Return the AUC of `values` (n,). The other folds decide whether high or low values mean a positive."""
    from sklearn.metrics import roc_auc_score

    scores = np.empty(len(values))
    for number in range(FOLDS):
        held_out = folds == number
        high_is_positive = roc_auc_score(targs[~held_out], values[~held_out]) >= 0.5
        scores[held_out] = values[held_out] if high_is_positive else -values[held_out]
    return float(roc_auc_score(targs, scores))
