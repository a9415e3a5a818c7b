"""Find the images of a split of a run: those of its training, in the folder or CSV file they came from or in a copy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.progress import counted
from cxr_fastai.core.recipe import SHIFT
from cxr_fastai.core.run import Run
from cxr_fastai.data.items import data_root, image_root, read_items
from cxr_fastai.data.splits import count_images

NO_IMAGES = {
    'test': 'Evaluate the validation images of the run: --split valid.',
    SHIFT: 'Training holds them out with --set shift_pct=0.2.',
}
"""What to do about a split without images."""


def find_split(
    run: Run,
    data: Path | None,
    split: str,
    limit: int | None = None,
    by: Sequence[str] = (),
    out_of_fold: pd.DataFrame | None = None,
) -> tuple[Path, pd.DataFrame]:
    """Find the images of a split; return their folder, and their items with the additional columns `by`.

    `train` and `valid` mean the splits of the run's training if `data` contains these images, which may be a copy of
    the original folder. So no image that the network was trained on counts as a validation image. `out_of_fold` is as
    in `own_images`.

    Raises `UsageError` for a split without images, and if only some of the run's images are in `data`.
    """
    trained_on = run.images if run.images and run.images.exists() else None
    root = data_root(data or trained_on)
    is_own_split = split != 'test' or run.is_from_table
    own = own_images(run, split, out_of_fold) if is_own_split else run.items[:0]
    if data is None and run.is_from_table and own.empty:
        items = run.used_items  # the table lists no image of the split, and its folder need not be a data set
    elif folder_with(own, root):
        items = _add_columns(own, root, by)
    else:
        items = read_items(root, columns=by)
        _check_unknown(items, run, split, root)
    in_split = items[items.split == split]
    if limit is not None:
        in_split = in_split.groupby('label', sort=False).head(limit)
    if in_split.empty:
        counts = ', '.join(f'{name} {n}' for name, n in count_images(items).sum(axis=1).items())
        advice = NO_IMAGES.get(split, 'Choose another --split.')
        raise UsageError(f'{root}: the split {split} has no images (found {counts}). {advice}')
    return image_root(root), in_split.reset_index(drop=True)


def _stored_columns(stored: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(group['column'] for group in stored.get('subgroups', ()))) or ['kind']


def find_images(
    run: Run,
    data: Path | None,
    split: str,
    limit: int | None,
    by: Sequence[str] | None,
    stored: Mapping[str, Any],
    out_of_fold: pd.DataFrame | None = None,
) -> tuple[Path, pd.DataFrame, list[str]]:
    """Find the images of a split as `find_split` does; return also the columns `by`, or those of `stored` metrics."""
    if by is not None:
        columns = [column.strip().lower() for column in by]  # as in the header of a CSV file of images
        return *find_split(run, data, split, limit, columns, out_of_fold), columns
    columns = _stored_columns(stored)
    root, items = _find_with_stored_columns(run, data, split, limit, columns, out_of_fold)
    return root, items, [column for column in columns if column in items]


def _find_with_stored_columns(
    run: Run,
    data: Path | None,
    split: str,
    limit: int | None,
    columns: Sequence[str],
    out_of_fold: pd.DataFrame | None,
) -> tuple[Path, pd.DataFrame]:
    """Find the images of a split as `find_split` does, without those of `columns` that they do not have any more."""
    try:
        return find_split(run, data, split, limit, columns, out_of_fold)
    except UsageError:
        find_split(run, data, split, limit, out_of_fold=out_of_fold)  # raises if the columns are not the reason
    found = [column for column in columns if _has_column(run, data, split, column, out_of_fold)]
    warnings.warn(
        f'the images have no column {" or ".join(column for column in columns if column not in found)} any more, by '
        'which the last evaluation of this split reported subgroups. Name the CSV file that has it, or choose --by.',
        CXRWarning,
        stacklevel=3,
    )
    return find_split(run, data, split, limit, found, out_of_fold)


def _has_column(run: Run, data: Path | None, split: str, column: str, out_of_fold: pd.DataFrame | None) -> bool:
    try:
        find_split(run, data, split, by=[column], out_of_fold=out_of_fold)
    except UsageError:
        return False
    return True


def own_images(run: Run, split: str, out_of_fold: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the items of `split` in the training, without images that it skipped as unreadable.

    With out-of-fold predictions the split `valid` are the images that have one. They are read from the run unless the
    caller has read them, and passes them as `out_of_fold`.
    """
    items = run.used_items
    if split != 'valid' or not run.has_out_of_fold:
        return items[items.split == split]
    predictions = run.out_of_fold if out_of_fold is None else out_of_fold
    return items[items.path.isin(predictions.path)].assign(split='valid')


def folder_with(items: pd.DataFrame, *roots: Path | None) -> Path | None:
    """Return the image folder of the first of `roots` that contains all `items`; None for none, and without items."""
    if items.empty:
        return None
    for root in roots:
        if root is None:
            continue
        folder = image_root(root)
        if all((folder / path).exists() for path in items.path):
            return folder
    return None


def _add_columns(items: pd.DataFrame, root: Path, columns: Sequence[str]) -> pd.DataFrame:
    missing = [column for column in columns if column not in items]
    if not missing:
        return items
    return items.merge(read_items(root, columns=missing)[['path', *missing]], on='path')


def _check_unknown(items: pd.DataFrame, run: Run, split: str, root: Path) -> None:
    """Raise `UsageError` if images of a foreign train or valid split belong to the run, perhaps to another split."""
    if split == 'test':
        return
    shared = items.path[items.split == split].isin(run.items.path).sum()
    if shared and split == 'valid' and run.recipe.valid == 'none':
        raise UsageError(
            f'{run.path}: trained on all images, so it has no validation images. Give it the predictions of a '
            f'cross-validation: `{run.out_of_fold_evaluation()}`.'
        )
    if shared:
        raise UsageError(
            f'{root}: the run contains {counted(shared)} of its {split} split, but other images of the run are missing '
            'there. Name the complete folder that the run was trained on.'
        )
