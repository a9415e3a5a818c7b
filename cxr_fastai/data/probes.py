"""How well numbers that should tell nothing tell the label, or the split: what a network could cheat with."""
from __future__ import annotations

import numpy as np
import pandas as pd

from cxr_fastai.core.files import POSITIVE, VOCAB
from cxr_fastai.data.image_stats import TRAITS

TELLING = 0.70
"""Cross-validated AUC above which a number gives something away."""
ENOUGH = 20
"""Films, and patients, on either side below which nothing is probed: chance alone would look telling."""
FOLDS = 5
LABEL = 'label'
"""The probe of the label, beside those of the splits."""


def probe_label(films: pd.DataFrame) -> pd.DataFrame:
    """The AUC of each of `TRAITS` for the label: columns `probe trait auc`, the highest first.

    `films` has the columns `split label patient` and the traits. Measured on train films where there are enough of both
    classes, else on all; empty where there are too few.
    """
    train = films[films.split == 'train']
    for chosen in (train, films):
        probed = _probe(LABEL, chosen, (chosen.label == VOCAB[POSITIVE]).to_numpy())
        if len(probed): break
    return probed


def probe_shift(films: pd.DataFrame) -> pd.DataFrame:
    """The AUC of each of `TRAITS` for telling films of train from those of valid and of test, within a class: columns
    `probe trait auc`. What differs there makes validation a poor guide to the test."""
    found = []
    for label in VOCAB:
        for other in ('valid', 'test'):
            chosen = films[(films.label == label) & films.split.isin(['train', other])]
            found.append(_probe(f'train and {other}, {label}', chosen, (chosen.split == other).to_numpy()))
    return pd.concat(found, ignore_index=True)


def _probe(name: str, films: pd.DataFrame, targs: np.ndarray) -> pd.DataFrame:
    """Columns `probe trait auc` for the boolean `targs` (n,) of the films."""
    from sklearn.model_selection import StratifiedGroupKFold
    patients, rows = films.patient.to_numpy(), []
    if min(min(side.sum(), len(set(patients[side]))) for side in (targs, ~targs)) >= ENOUGH:
        splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0).split(films, targs, patients)
        folds = np.empty(len(films), int)
        for i, (_, held_out) in enumerate(splits): folds[held_out] = i
        rows = [(name, trait, _auc(films[trait].to_numpy(float), targs, folds))
                for trait in TRAITS if films[trait].nunique() > 1]
    table = pd.DataFrame(rows, columns=['probe', 'trait', 'auc'])
    return table.sort_values('auc', ascending=False, kind='stable', ignore_index=True)


def _auc(x: np.ndarray, targs: np.ndarray, folds: np.ndarray) -> float:
    """AUC of the number `x` (n,), read upwards or downwards as the other `folds` (n,) say."""
    from sklearn.metrics import roc_auc_score
    score = np.empty(len(x))
    for i in range(FOLDS):
        held_out = folds == i
        upwards = roc_auc_score(targs[~held_out], x[~held_out]) >= 0.5
        score[held_out] = x[held_out] if upwards else -x[held_out]
    return float(roc_auc_score(targs, score))
