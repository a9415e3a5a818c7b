"""Patient-grouped splits, and checks of splits."""

from __future__ import annotations

import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import VOCAB

FEW = 50
"""Validation images of a class below which selecting an epoch is a matter of luck."""


def split_patients(items: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Pool train and valid, and give a tenth of the patients to valid, with the shares of the classes kept."""
    from sklearn.model_selection import StratifiedGroupKFold

    pool = items[items.split.isin(['train', 'valid'])]
    patients = pool.groupby('label').patient.nunique().reindex(VOCAB, fill_value=0)
    if patients.min() < 2:
        raise UsageError(f'--valid patients needs two patients of each class; found {describe_counts(patients)}.')
    folds = StratifiedGroupKFold(min(10, patients.min()), shuffle=True, random_state=seed)
    _, chosen = next(folds.split(pool, pool.label, pool.patient))
    split = items.split.where(~items.index.isin(pool.index), 'train')
    split.loc[pool.index[chosen]] = 'valid'
    return items.assign(split=split)


def check_trainable(items: pd.DataFrame) -> None:
    """Raise `UsageError` unless train has two images of each class and valid has any."""
    counts = count_images(items)
    if (counts.loc['train'] < 2).any():
        raise UsageError(
            f'train holds {describe_counts(counts.loc["train"])}: a classifier needs two images or more of each class.'
        )
    if not counts.loc['valid'].sum():
        raise UsageError(
            'valid holds no image, so no epoch could be chosen: `--valid patients` takes a tenth of the '
            'patients of train.'
        )


def check_leakage(items: pd.DataFrame) -> None:
    """Raise `UsageError` where a patient has images in two splits: what is measured would flatter."""
    if n := len(leaking_patients(items)):
        raise UsageError(
            f'patients with images in two splits: {n}. Figures on one would flatter: `cxr-fastai data '
            'audit` tells more. --valid patients mends train and valid; --allow-leakage trains anyway.'
        )


def leaking_patients(items: pd.DataFrame) -> pd.Series:
    """The splits of each patient (the index) who is in more than one, as lists."""
    splits = items.groupby('patient').split.unique().map(sorted)
    return splits[splits.map(len) > 1]


def doubt_validation(items: pd.DataFrame) -> str | None:
    """What the size of valid leaves unknown, in words; None where it has enough images of each class."""
    from scipy.stats import binomtest

    counts = count_images(items).loc['valid']
    if counts.min() >= FEW:
        return None
    n = int(counts.max())
    low = binomtest(n, n).proportion_ci(method='wilson').low
    return (
        f'validation has only {describe_counts(counts)} images: even {n} of {n} right would leave the true rate anywhere '
        f'from {low:.2f} to 1, and the epoch it selects is a matter of luck.'
    )


def describe_counts(counts: pd.Series) -> str:
    """`counts` in words, such as `12 NORMAL and 30 PNEUMONIA`."""
    return ' and '.join(f'{n} {name}' for name, n in counts.items())


def count_images(items: pd.DataFrame) -> pd.DataFrame:
    """Images by split (rows train, valid, test) and class (columns in the order of the vocabulary)."""
    counts = pd.crosstab(items.split, items.label)
    return counts.reindex(index=['train', 'valid', 'test'], columns=list(VOCAB), fill_value=0)
