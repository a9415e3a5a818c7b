"""Read a folder or a CSV file of images into the items table, which has one row per image."""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.files import StrPath
from cxr_fastai.core.folders import describe_own_folder
from cxr_fastai.core.foreign import open_regular, read_json
from cxr_fastai.core.paths import FOREIGN_PATH, correct_path, correct_paths, is_windows_path
from cxr_fastai.core.recipe import VOCAB, Recipe, check_choice
from cxr_fastai.core.schemas import Choice, Table
from cxr_fastai.data.find import LINK, TABLE_SUFFIXES, describe_ignored, find_images
from cxr_fastai.data.layout import (
    LAYOUT,
    check_spellings,
    find_base,
    has_splits,
    outside_reason,
    read_class,
    read_kind,
    read_place,
    read_split,
)
from cxr_fastai.data.listings import check_files, describe_rows, drop_repeated_rows, read_listing
from cxr_fastai.data.shift import hold_out_soft
from cxr_fastai.data.splits import (
    UNKNOWN_PATIENT,
    count_images,
    describe_counts,
    split_patients,
    unknown_patients,
)
from cxr_fastai.images.decode import SUFFIXES

ITEM_COLUMNS = ['path', 'label', 'split', 'patient', 'kind']
"""The columns of the items table. `path` is relative to the data root; `kind` is normal, bacteria, virus or unknown."""
PNEUMONIA_NAME = re.compile(r'person(?P<id>\d+)_(?P<kind>bacteria|virus)_\d+')
NORMAL_NAME = re.compile(r'(?P<id>(NORMAL2-)?IM-\d+)-\d+')
NO_PATIENT = ('', '?', '-', 'n/a', 'unknown')
"""Cells of the column `patient`, in lower case, that stand for no value: their images are not all of one patient."""
MAX_CLASSES = 2**20
"""Largest `classes.json`, in bytes."""

log = logging.getLogger(__name__)


def data_root(data: StrPath | None = None) -> Path:
    """Return the folder or CSV file of images: `data`, or the environment variable CXR_DATA, or data/chest_xray.

    Raises `CXRError` if it does not exist or is neither a folder nor a file; the message says how to get images.
    """
    root = correct_path(data or os.environ.get('CXR_DATA') or 'data/chest_xray')
    _check_root(root)
    return root


def _check_root(root: Path) -> None:
    """Raise `CXRError` if the folder or CSV file `root` does not exist, or is neither a folder nor a file."""
    if root.is_dir():
        return
    if root.exists():
        open_regular(root).close()  # raises an error that names a pipe or a device
        return
    if is_windows_path(root):
        raise CXRError(f'{root}: no such folder of images: {FOREIGN_PATH}.')
    if root.suffix.lower() in TABLE_SUFFIXES:
        raise CXRError(f'{root}: no such file. Check the name of the table of images.')
    raise CXRError(
        f'{root}: no such folder of images. Name a folder ({LAYOUT}) with --data DIR or CXR_DATA, download the data '
        'set with `cxr-fastai data download data/chest_xray`, or make synthetic images with `cxr-fastai data demo DIR`.'
    )


def image_root(root: StrPath) -> Path:
    """Return the folder that the paths of the items are relative to: `root`, or the folder of the CSV file `root`."""
    root = Path(root)
    return root.parent if root.is_file() else root


def read_items(
    root: StrPath,
    valid: str = 'official',
    seed: int = 42,
    limit: int | None = None,
    columns: Sequence[str] = (),
    valid_pct: float = 0.1,
    fold: int = 0,
) -> pd.DataFrame:
    """Return the items table of the folder or CSV file `root`, sorted by path.

    `valid` is `official` (the folder `val`), `patients` (the proportion `valid_pct` of the patients of train and val
    together, drawn with the random `seed`; `fold` is the number of that part), or `none` (the images of val join those
    of train). `limit` keeps the first images of each class and split. `columns` names further columns of a CSV file to
    include. `.attrs['ignored']` counts ignored files by reason. Raises `CXRError` if `root` does not exist or contains
    no images, `UsageError` for an unknown class, split, column or `valid`.
    """
    root = Path(root)
    check_choice('valid', valid)
    _check_root(root)
    items = _read_csv(root, columns) if root.is_file() else _read_folders(root)
    missing = [name for name in columns if name not in items]
    if missing:
        raise UsageError(
            f'{root}: no column {" or ".join(missing)}. Choose one of {", ".join(items)}, or another column of a CSV '
            'file of images.'
        )
    return _split_and_limit(items, valid, seed, limit, valid_pct, fold)


def read_recipe_items(root: Path, recipe: Recipe) -> pd.DataFrame:
    """Return the items table of `root` as `recipe` splits and limits it; see `read_items` and `split_items`."""
    return split_items(read_items(root), image_root(root), recipe)


def split_items(items: pd.DataFrame, root: Path, recipe: Recipe) -> pd.DataFrame:
    """Return `items`, with paths relative to the folder `root`, as `recipe` splits and limits them.

    With `recipe.shift_pct`, images are held out of training first; see `data.shift`.
    """
    return divide_items(hold_out_items(items, root, recipe), recipe)


def hold_out_items(items: pd.DataFrame, root: Path, recipe: Recipe) -> pd.DataFrame:
    """Return `items` with the images that `recipe` holds out in the split `shift`. For this, images are read."""
    if not recipe.shift_pct:
        return items
    return hold_out_soft(items, root, recipe.shift_pct, recipe.modality)


def divide_items(items: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Return the `items` that are not held out as `recipe` divides them into train and valid, and limits them."""
    return _split_and_limit(items, recipe.valid, recipe.seed, recipe.limit, recipe.valid_pct, recipe.fold)


def read_table(
    table: pd.DataFrame,
    root: StrPath,
    valid: str = 'official',
    seed: int = 42,
    limit: int | None = None,
    valid_pct: float = 0.1,
    fold: int = 0,
) -> pd.DataFrame:
    """Return the items table of the images in the rows of `table`, with paths relative to the folder `root`.

    The columns are those of a CSV file: `path`, `label`, and optionally `split` and `patient`. The other parameters,
    the result and the errors are those of `read_items`.
    """
    root = Path(root)
    check_choice('valid', valid)
    missing = [name for name in ('path', 'label') if name not in table]
    if missing:
        raise UsageError(f'the table has no column {" or ".join(missing)}, but {", ".join(map(str, table))}.')
    texts = table.assign(path=correct_paths(root, map(str, table.path))).reset_index(drop=True)
    return _split_and_limit(_read_rows(texts, root), valid, seed, limit, valid_pct, fold)


def _split_and_limit(
    items: pd.DataFrame, valid: str, seed: int, limit: int | None, valid_pct: float, fold: int
) -> pd.DataFrame:
    if valid == 'patients':
        items = split_patients(items, seed, valid_pct, fold)
    elif valid == 'none':
        items = items.assign(split=items.split.replace('valid', 'train'))
    if limit is not None:
        items = items.groupby(['split', 'label'], sort=False).head(limit).reset_index(drop=True)
    return items


def _read_folders(root: Path) -> pd.DataFrame:
    base = find_base(root)
    classes_only = not has_splits(base)
    images, ignored = find_images(base)
    rows = []
    for image in images:
        folders = image.relative_to(base).parts[:-1]
        place = read_place(folders, classes_only)
        if place:
            rows.append((image.relative_to(root).as_posix(), *place))
        else:
            ignored[outside_reason(folders)] += 1
    if not rows:
        raise CXRError(_describe_empty(root, ignored))
    items = _make_items(pd.DataFrame(rows, columns=['path', 'split', 'label']), ignored, root)
    check_spellings([root / path for path, *_ in rows], base, classes_only, _read_classes(root))
    return items


def _describe_empty(root: Path, ignored: Counter[str]) -> str:
    """Return the message about a folder without images in class folders."""
    kind = describe_own_folder(root)
    if kind:
        return f'{root}: {kind}, not a folder of images. Name the folder or the CSV file of the images.'
    left_out = f' Left out: {describe_ignored(ignored)}.' if ignored else ''
    if LINK in ignored:
        left_out += ' Images behind such links can be listed in a CSV file.'
    return (
        f'{root}: no images found in class folders. Arrange the folders as {LAYOUT}, with files that end in '
        f'{", ".join(SUFFIXES)}.{left_out}'
    )


def _read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    table = read_listing(path)
    table = table.assign(path=correct_paths(path.parent, table.path))
    items = _read_rows(table, path)
    rows_by_path = table.assign(path=table.path.map(posixpath.normpath)).drop_duplicates('path').set_index('path')
    for name in columns:
        if name in rows_by_path and name not in items:
            items[name] = items.path.map(rows_by_path[name])
    return items


def _read_rows(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the items table of the rows of the CSV file `path`, or of a table of images below the folder `path`."""
    split = table['split'] if 'split' in table else pd.Series('train', table.index)
    splits = split.map(read_split, na_action='ignore')
    unknown = splits.isna()
    if unknown.any():
        names = ', '.join(sorted(set(split[unknown].fillna('(empty)'))))
        raise UsageError(f'{path}: unknown split {names} in {describe_rows(unknown)}. Use train, valid or test.')
    table = table.assign(split=splits, path=table.path.map(posixpath.normpath))
    items = _make_items(table, Counter(), path)
    check_files(table, path)
    return items


def _make_items(images: pd.DataFrame, ignored: Counter[str], source: Path) -> pd.DataFrame:
    """Return the items table of `images`: columns `path label split`, and optionally `patient`, read from `source`."""
    label = _map_classes(images, source)
    for name, n in images.label[label.isna()].value_counts().items():
        ignored[f'class {name}'] = n
    images = images.assign(label=label)[label.notna()]
    if images.empty:
        raise CXRError(f'{source}: no images to use ({len(label)} listed). List images of {" and ".join(VOCAB)}.')
    images, repeated = drop_repeated_rows(images, source)
    if repeated:
        ignored['listed twice'] = repeated
    names = [parse_name(path, label) for path, label in zip(images.path, images.label, strict=True)]
    parsed = pd.DataFrame(names, columns=['kind', 'patient'], index=images.index)
    images = images.assign(kind=parsed.kind, patient=_fill_patients(images, parsed.patient))
    items = images[ITEM_COLUMNS].sort_values(['path', 'split'], ignore_index=True)
    items.attrs['ignored'] = dict(ignored)
    return items


def _fill_patients(images: pd.DataFrame, parsed: pd.Series) -> pd.Series:
    """Return the column `patient` of `images`, or where it has no value, the `parsed` patient of the file name."""
    if 'patient' not in images:
        return parsed
    has_no_value = images.patient.isna() | images.patient.astype(str).str.strip().str.lower().isin(NO_PATIENT)
    return images.patient.mask(has_no_value, parsed)


def _map_classes(images: pd.DataFrame, source: Path) -> pd.Series:
    """Return the class of each image by `classes.json`; None for images that it leaves out."""
    classes: dict[str, str | None] = {name: read_class(name) for name in images.label.unique() if read_class(name)}
    classes |= _read_classes(source)
    unknown = ~images.label.isin(list(classes))
    if unknown.any():
        names = ', '.join(repr(name) for name in sorted(set(images.label)))
        rows = f' ({describe_rows(unknown)})' if source.is_file() else ''
        raise UsageError(
            f'{source}: found the classes {names}{rows}; expected {" and ".join(VOCAB)} ({LAYOUT}). '
            f'Map the other classes in {image_root(source) / "classes.json"}, for example {{"Healthy": "NORMAL", '
            '"COVID": null}; null leaves a class out.'
        )
    return images.label.map(classes)


def _read_classes(root: Path) -> dict[str, str | None]:
    """Return the mapping of other class names in `classes.json` next to the images; None leaves a class out."""
    path = image_root(root) / 'classes.json'
    if not path.exists():
        return {}
    classes = read_json(path, MAX_CLASSES, 'Correct or delete it.', UsageError)
    rule = Table(Choice(VOCAB, optional=True))
    if not rule.accepts(classes):
        raise UsageError(f'{path}: expected an object that maps class names to {", ".join(VOCAB)} or null.')
    return classes


class NameParts(NamedTuple):
    """What the file name of an image contains."""

    kind: str
    patient: str


def parse_name(path: str, label: str) -> NameParts:
    """Return the kind (`normal|bacteria|virus|unknown`) and the patient from the file name of the image `path`.

    If the file name does not contain the kind, that of its folder counts, such as `PNEUMONIA/BACTERIA`. The data set
    numbers its patients separately for each kind, so a patient is identified by kind and number. The patient of an
    image with another form of name is unknown: `UNKNOWN_PATIENT` and its path.
    """
    image = PurePosixPath(path)
    unknown = f'{UNKNOWN_PATIENT}{image.with_suffix("")}'
    if label == 'NORMAL':
        match = NORMAL_NAME.match(image.name)
        return NameParts('normal', match['id'] if match else unknown)
    match = PNEUMONIA_NAME.match(image.name)
    if match:
        return NameParts(match['kind'], f'{match["kind"]}-{match["id"]}')
    return NameParts(read_kind(image.parent.name) or 'unknown', unknown)


def identify_images(items: pd.DataFrame) -> str:
    """Return the SHA-256 of the paths and labels of the images; it does not depend on the splits."""
    images = sorted(zip(items.path, items.label, strict=True))
    lines = ['\0'.join(image) for image in images]
    return hashlib.sha256('\n'.join(lines).encode(errors='surrogateescape')).hexdigest()


def log_ignored(items: pd.DataFrame, source: Path) -> None:
    """Log the files that were left out when `items` were read from `source`, by reason; nothing if there are none."""
    ignored = items.attrs.get('ignored')
    if ignored:
        log.info('%s: files left out: %s', source, describe_ignored(ignored))


def describe_items(items: pd.DataFrame) -> str:
    """Return one line: images by split and class, unknown patients if there are any, and ignored files by reason."""
    counts = count_images(items)
    text = '; '.join(f'{split}: {describe_counts(row)}' for split, row in counts.iterrows() if row.sum())
    n_unknown = int(unknown_patients(items).sum())
    if n_unknown:
        text += f'; patient unknown: {n_unknown:,} of {len(items):,} images'
    ignored = items.attrs.get('ignored')
    if ignored:
        text += f'; ignored: {describe_ignored(ignored)}'
    return text
