"""Files on disk become the items table, one row an image: `path label split patient kind`."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from cxr_fastai.core.errors import CXRError, UsageError
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.data.find import check_files, drop_repeats, find_images, read_listing, rows_where
from cxr_fastai.data.splits import count_images, describe_counts, split_patients
from cxr_fastai.images.decode import SUFFIXES

COLUMNS = ['path', 'label', 'split', 'patient', 'kind']
SPLITS = {'train': 'train', 'val': 'valid', 'valid': 'valid', 'test': 'test'}
"""Names of folders, and of the splits they hold."""
VALID = ('official', 'patients')
"""How validation images are chosen: the folders as they are, or a tenth of the patients of train and val together."""
PNEUMONIA_NAME = re.compile(r'person(?P<id>\d+)_(?P<kind>bacteria|virus)_\d+')
NORMAL_NAME = re.compile(r'(?P<id>(NORMAL2-)?IM-\d+)-\d+')
OTHERS = {'chest_xray': 'nested chest_xray', 'masks': 'masks'}
"""Folders beside the splits that are known and not read: the Kaggle zip's second copy, the demo's masks."""
EXPECTED = 'train|val|test / NORMAL|PNEUMONIA, or NORMAL and PNEUMONIA alone'


def data_root(data: Path | None = None) -> Path:
    """The folder or CSV of images: `data`, else the environment's CXR_DATA, else data/chest_xray.

    Raises `CXRError` where it does not exist, with the ways to get one.
    """
    root = Path(data or os.environ.get('CXR_DATA') or 'data/chest_xray')
    if root.exists():
        return root
    raise CXRError(
        f'{root}: no such folder of images. Name one by --data DIR or CXR_DATA; fetch the real ones: '
        '`cxr-fastai data download data/chest_xray`; or make synthetic ones: `cxr-fastai data demo DIR`.'
    )


def image_root(root: Path) -> Path:
    """The folder that the items' paths are relative to: `root`, or the folder of the CSV `root`."""
    return root.parent if root.is_file() else root


def read_items(
    root: Path, valid: str = 'official', seed: int = 42, limit: int | None = None, columns: Sequence[str] = ()
) -> pd.DataFrame:
    """The items table of the folder or CSV `root`, sorted by path; `.attrs['ignored']` counts what was passed over.

    `limit` keeps the first images of each class and split; `columns` names further ones of a CSV that are wanted. Raises
    `CXRError` where no image is found, `UsageError` for a class that is not in the vocabulary, an unknown `valid` or a
    column that is not there.
    """
    if valid not in VALID:
        raise UsageError(f'--valid {valid}: choose {" or ".join(VALID)}.')
    items = _from_csv(root, columns) if root.is_file() else _from_folders(root)
    if missing := [name for name in columns if name not in items]:
        raise UsageError(
            f'{root}: no column {" or ".join(missing)}: there are {", ".join(items)}, and what a CSV '
            'of images has beside them.'
        )
    if valid == 'patients':
        items = split_patients(items, seed)
    if limit is not None:
        items = items.groupby(['split', 'label'], sort=False).head(limit).reset_index(drop=True)
    return items


def parse_name(path: str, label: str) -> tuple[str, str]:
    """Kind (`normal|bacteria|virus|unknown`) and patient that the name of the image `path` tells.

    The data set numbers its patients anew for each kind, so the patient is kind and number. An image with another kind
    of name counts as a patient of its own, called by its path.
    """
    normal, image = label == 'NORMAL', PurePosixPath(path)
    found = (NORMAL_NAME if normal else PNEUMONIA_NAME).match(image.name)
    if not found:
        return 'normal' if normal else 'unknown', str(image.with_suffix(''))
    return ('normal', found['id']) if normal else (found['kind'], f'{found["kind"]}-{found["id"]}')


def identify_images(items: pd.DataFrame) -> str:
    """The SHA-256 of the images' paths and labels, in whatever splits they are."""
    images = sorted(zip(items.path, items.label, strict=True))
    return hashlib.sha256('\n'.join(map('\0'.join, images)).encode(errors='surrogateescape')).hexdigest()


def describe_items(items: pd.DataFrame) -> str:
    """The images by split and class, and what was ignored, in a line."""
    images = '; '.join(f'{split}: {describe_counts(row)}' for split, row in count_images(items).iterrows() if row.sum())
    ignored = ', '.join(f'{n} {reason}' for reason, n in items.attrs.get('ignored', {}).items())
    return images + (f'; ignored: {ignored}' if ignored else '')


def _from_folders(root: Path) -> pd.DataFrame:
    base = root
    while not _has(base, (*SPLITS, *VOCAB)) and (base / 'chest_xray').is_dir():
        base /= 'chest_xray'
    images, ignored = find_images(base)
    rows, flat = [], not _has(base, SPLITS)
    for image in images:
        folders = image.relative_to(base).parts[:-1]
        if place := _place(folders, flat):
            rows.append((image.relative_to(root).as_posix(), *place))
        else:
            ignored[OTHERS.get(folders[0] if folders else '', 'outside the class folders')] += 1
    if not rows:
        raise CXRError(
            f'{root}: no images found. Expected folders {EXPECTED}, with files called {", ".join(SUFFIXES)}.'
        )
    return _table(pd.DataFrame(rows, columns=['path', 'split', 'label']), ignored, root)


def _has(folder: Path, names: Iterable[str]) -> bool:
    return any((folder / name).is_dir() for name in names)


def _place(folders: tuple[str, ...], flat: bool) -> tuple[str, str] | None:
    """Split and label that the folders above an image tell; in a `flat` layout of classes alone, all are for training."""
    if flat:
        return ('train', folders[0]) if len(folders) == 1 else None
    return (SPLITS[folders[0]], folders[1]) if len(folders) == 2 and folders[0] in SPLITS else None


def _from_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    table = read_listing(path)
    split = table['split'] if 'split' in table else pd.Series('train', table.index)
    if (unknown := ~split.isin(list(SPLITS))).any():
        found = ', '.join(sorted(set(split[unknown].fillna('(empty)'))))
        raise UsageError(f'{path}: unknown split {found} in {rows_where(unknown)}: use train, valid or test.')
    table = table.assign(split=split.map(SPLITS), path=table.path.map(posixpath.normpath))
    items = _table(table, Counter(), path)
    check_files(table, path)
    images = table.drop_duplicates('path').set_index('path')
    for name in columns:
        if name in images and name not in items:
            items[name] = items.path.map(images[name])
    return items


def _read_classes(root: Path) -> dict[str, str | None]:
    """What `classes.json` among the images says of other names of classes; None leaves a class out."""
    path = image_root(root) / 'classes.json'
    if not path.exists():
        return {}
    try:
        classes = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f'{path}: damaged ({type(error).__name__}).') from None
    if not isinstance(classes, dict) or not all(label in (*VOCAB, None) for label in classes.values()):
        raise UsageError(f'{path}: expected an object that maps names of classes to {", ".join(VOCAB)} or null.')
    return classes


def _table(images: pd.DataFrame, ignored: Counter, source: Path) -> pd.DataFrame:
    classes = {name: name for name in VOCAB} | _read_classes(source)
    if (unknown := ~images.label.isin(list(classes))).any():
        found = ', '.join(repr(name) for name in sorted(set(images.label)))
        where = f' ({rows_where(unknown)})' if source.is_file() else ''
        raise UsageError(
            f'{source}: found the classes {found}{where}; expected {" and ".join(VOCAB)} ({EXPECTED}). '
            f'Say in {image_root(source) / "classes.json"} what the others are, as in {{"Normal": "NORMAL", '
            '"COVID": null}; null leaves a class out.'
        )
    label = images.label.map(classes)
    for name, n in images.label[label.isna()].value_counts().items():
        ignored[f'class {name}'] = n
    images = images.assign(label=label)[label.notna()]
    if images.empty:
        raise CXRError(f'{source}: no image is left of the {len(label)} listed there.')
    images, repeats = drop_repeats(images, source)
    if repeats:
        ignored['listed twice'] = repeats
    parsed = [parse_name(path, label) for path, label in zip(images.path, images.label, strict=True)]
    told = pd.DataFrame(parsed, columns=['kind', 'patient'], index=images.index)
    patient = images['patient'].fillna(told.patient) if 'patient' in images else told.patient
    items = images.assign(kind=told.kind, patient=patient)[COLUMNS].sort_values(['path', 'split'], ignore_index=True)
    items.attrs['ignored'] = dict(ignored)
    return items
