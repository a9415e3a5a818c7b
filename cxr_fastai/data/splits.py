"""Split images by patient, and check that splits can be trained and validated on."""

from __future__ import annotations

import warnings

import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import SHIFT, SPLITS, VOCAB, Recipe

MIN_VALID_IMAGES = 50
"""Validation images of each class below which the choice of an epoch is mostly chance."""
UNKNOWN_PATIENT = 'unknown:'
"""Beginning of the patient of an image whose patient neither a column `patient` nor the file name tells. The rest is
its path: such an image is split and counted on its own."""


def unknown_patients(items: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows of a table with a column `patient` have an unknown patient, with the index of `items`.

    Without this column the patients of all rows are unknown.
    """
    if 'patient' not in items:
        return pd.Series(True, items.index)
    return items.patient.astype(str).str.startswith(UNKNOWN_PATIENT)


def count_patients(items: pd.DataFrame) -> int | str:
    """Return the number of known patients of the images in `items`, or `unknown` if no patient is known."""
    known = items[~unknown_patients(items)]
    return int(known.patient.nunique()) if len(known) else 'unknown'


def describe_patients(patients: int | str, n_unknown: int) -> str:
    """Return the number of `patients` in words, and the number of images whose patient is unknown.

    >>> describe_patients(12, 0), describe_patients(12, 3), describe_patients('unknown', 40)
    ('12 patients', '12 patients and 3 images of unknown patients', 'unknown patients')
    """
    if isinstance(patients, str):
        return f'{patients} patients'
    text = counted(patients, 'patient')
    if n_unknown:
        text += f' and {counted(n_unknown)} of unknown patients'
    return text


def unknown_patients_warning(items: pd.DataFrame) -> str | None:
    """Return what cannot be said about `items` because patients are unknown, else None."""
    images = _describe_unknown(items)
    if images is None:
        return None
    return (
        f'the patient of {images} is unknown, so a patient may have images in two splits, and the intervals of metrics '
        f'assume that each of these images is of another patient. {_NAME_PATIENTS}'
    )


_NAME_PATIENTS = 'List the images in a CSV file with the column patient.'


def _describe_unknown(items: pd.DataFrame) -> str | None:
    """Return the number of images whose patient is unknown in words, None if there are none."""
    n = int(unknown_patients(items).sum())
    if n == 0:
        return None
    return 'all images' if n == len(items) else f'{n:,} of {len(items):,} images'


def split_patients(items: pd.DataFrame, seed: int, valid_pct: float = 0.1, fold: int = 0) -> pd.DataFrame:
    """Return `items` with the proportion `valid_pct` of the patients of train and valid in valid, others in train.

    The proportion is rounded to one of 1/2, 1/3, 1/4 and so on, and `fold` is the number of the part of the patients
    that is taken, from 0. Both splits get about the same proportion of each class. Test images stay test images. Images
    of unknown patients are drawn one by one, with a `CXRWarning`. Raises `UsageError` if a class has fewer than two
    patients, and if there is no such fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    pool = items[items.split.isin(['train', 'valid'])]
    images = _describe_unknown(pool)
    if images:
        warnings.warn(
            f'--valid patients: the patient of {images} is unknown. They are drawn one by one, so a patient may be in '
            f'train and in valid. {_NAME_PATIENTS}',
            CXRWarning,
            stacklevel=2,
        )
    patients = pool.groupby('label').patient.nunique().reindex(VOCAB, fill_value=0)
    if patients.min() < 2:
        raise UsageError(
            f'--valid patients (the default) needs at least two patients of each class; found '
            f'{describe_counts(patients)}. Add images, or train with --valid official on images that are split already.'
        )
    folds = min(max(2, round(1 / valid_pct)), patients.min())
    if fold >= folds:
        raise UsageError(
            f'fold {fold}: there are {folds} parts of the patients ({describe_counts(patients)} patients, valid_pct '
            f'{valid_pct:g}), with the numbers 0 to {folds - 1}. Use fewer folds.'
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    _, valid_rows = list(splitter.split(pool, pool.label, pool.patient))[fold]
    split = items.split.where(~items.index.isin(pool.index), 'train')
    split.loc[pool.index[valid_rows]] = 'valid'
    return items.assign(split=split)


def describe_validation(items: pd.DataFrame, recipe: Recipe) -> str:
    """Return in one line which images of `items`, as `recipe` has split them, validate the network."""
    n = int(count_images(items).loc['valid'].sum())
    images = counted(n)
    if recipe.valid == 'none':
        return 'validation: none, the images of train and val are all trained on'
    if recipe.valid == 'official':
        return f'validation: val, as the images are split already ({images})'
    pool = items[items.split.isin(['train', 'valid'])]
    units = 'images, whose patients are unknown,' if unknown_patients(pool).all() else 'patients'
    return f'validation: {recipe.valid_pct:.0%} of the {units} of train and val ({images})'


def check_trainable(items: pd.DataFrame, valid: str = 'official') -> None:
    """Raise `UsageError` unless train has at least two images of each class, and valid at least one image.

    With `valid` `none`, a field of the recipe, no validation images are needed.
    """
    counts = count_images(items)
    if (counts.loc['train'] < 2).any():
        raise UsageError(
            f'train holds {describe_counts(counts.loc["train"])}. Training needs at least two images of each class. '
            'Add images of that class, or leave out --limit.'
        )
    if valid != 'none' and not counts.loc['valid'].sum():
        raise UsageError(
            'valid holds no image, so the best epoch cannot be selected. Use --valid patients, which takes a tenth '
            'of the patients of train.'
        )


def check_leakage(items: pd.DataFrame) -> None:
    """Raise `UsageError` if a patient has images in two splits: metrics on one of them would be too optimistic."""
    n = len(leaking_patients(items))
    if n:
        raise UsageError(
            f'patients with images in two splits: {n}. Metrics would be too optimistic. List them with `cxr-fastai '
            'data audit`; use --valid patients if they are in train and valid, or --allow-leakage to train anyway.'
        )


def leaking_patients(items: pd.DataFrame) -> pd.Series:
    """Return the sorted list of splits of each patient (the index) with images in more than one split."""
    splits = items.groupby('patient').split.unique().map(sorted)
    return splits[splits.map(len) > 1]


def validation_warning(items: pd.DataFrame) -> str | None:
    """Return a warning if valid is too small to select an epoch on, or of a single class, else None.

    The warning gives the lower limit of the 95% Wilson interval of a perfect result.
    """
    from scipy.stats import binomtest

    counts = count_images(items).loc['valid']
    if counts.min() >= MIN_VALID_IMAGES:
        return None
    if counts.min() == 0:
        return single_class_warning(items)
    n, unit = _largest_class(items[items.split == 'valid'])
    low = binomtest(n, n).proportion_ci(method='wilson').low
    return (
        f'validation has only {describe_counts(counts)} images. Even with {n} of {n} {unit} correct, the true rate '
        f'could be anywhere from {low:.2f} to 1, so the selected epoch is mostly a matter of chance.'
    )


def _largest_class(items: pd.DataFrame) -> tuple[int, str]:
    """Return the number of patients of the class with the most of them; of images, if the patients are unknown."""
    if unknown_patients(items).any():
        return int(items.label.value_counts().max()), 'images'
    return int(items.groupby('label').patient.nunique().max()), 'patients'


def single_class_warning(items: pd.DataFrame) -> str | None:
    """Return a warning if the images of valid are of a single class, so that they have no AUC, else None."""
    counts = count_images(items).loc['valid']
    if counts.min() > 0:
        return None
    return (
        f'validation has {describe_counts(counts)} images, so its AUC is undefined: the epoch is selected by the '
        'validation loss, and no threshold can be chosen (`evaluate` needs --threshold fixed:T). Use validation '
        'images of both classes.'
    )


def describe_counts(counts: pd.Series) -> str:
    """Return `counts` in words, such as `12 NORMAL and 30 PNEUMONIA`."""
    return ' and '.join(f'{n} {name}' for name, n in counts.items())


def count_images(items: pd.DataFrame) -> pd.DataFrame:
    """Return the number of images by split (rows train, valid, test) and class (columns in the order of `VOCAB`).

    The split `shift` has a row if there are images in it.
    """
    counts = pd.crosstab(items.split, items.label)
    rows = [split for split in SPLITS if split != SHIFT or split in counts.index]
    return counts.reindex(index=rows, columns=list(VOCAB), fill_value=0)
