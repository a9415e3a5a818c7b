"""The layouts of folders of images: which split, class and kind of pneumonia the names of the folders stand for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.recipe import VOCAB
from cxr_fastai.images.formats import MASKS

SPLIT_NAMES = {
    'train': 'train',
    'training': 'train',
    'val': 'valid',
    'valid': 'valid',
    'validation': 'valid',
    'test': 'test',
    'testing': 'test',
}
"""Name of a folder, or value in the CSV column `split`, in lower case, to the split that it stands for."""
CLASS_NAMES = {name.lower(): name for name in VOCAB}
"""Name of a folder, or value in the CSV column `label`, in lower case, to the class. `classes.json` maps others."""
KIND_NAMES = {'bacteria': 'bacteria', 'bacterial': 'bacteria', 'virus': 'virus', 'viral': 'virus'}
"""Word in the name of a folder, in lower case, to the kind of pneumonia of the images in it."""
WORD = re.compile('[a-z]+')
OTHER_FOLDERS = {'chest_xray': 'nested chest_xray', 'masks': MASKS}
"""Folders next to the splits that are ignored on purpose: the second copy in Kaggle's zip file, the demo's masks."""
NESTED = 'chest_xray'
OUTSIDE = 'outside the class folders'
LAYOUT = 'train|val|test / NORMAL|PNEUMONIA, or NORMAL and PNEUMONIA alone'


class Place(NamedTuple):
    """The split and the name of the class that the folders above an image stand for."""

    split: str
    label: str


def fold(name: object) -> str:
    """Return the form of a name of a split or class in which all its spellings are equal."""
    return str(name).strip().lower()


def read_split(name: object) -> str | None:
    """Return the split that `name` stands for, in any of its spellings; None for another name."""
    return SPLIT_NAMES.get(fold(name))


def read_class(name: object) -> str | None:
    """Return the class that `name` stands for, in upper or lower case; None for another name."""
    return CLASS_NAMES.get(fold(name))


def read_kind(folder: str) -> str | None:
    """Return the kind of pneumonia, `bacteria` or `virus`, that the name of a folder contains; None if it has none."""
    kinds = {KIND_NAMES[word] for word in WORD.findall(folder.lower()) if word in KIND_NAMES}
    return kinds.pop() if len(kinds) == 1 else None


def find_base(root: Path) -> Path:
    """Return the folder of the splits or classes: `root`, or a folder `chest_xray` below it, as in Kaggle's zip."""
    base = root
    while not _has_place(base):
        nested = [path for path in _subfolders(base) if fold(path.name) == NESTED]
        if not nested:
            break
        [base, *_] = nested
    return base


def _has_place(folder: Path) -> bool:
    return any(read_split(path.name) or read_class(path.name) for path in _subfolders(folder))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def has_splits(base: Path) -> bool:
    """Return whether the folder `base` contains a folder of a split, and not only those of the classes."""
    return any(read_split(path.name) for path in _subfolders(base))


def read_place(folders: tuple[str, ...], classes_only: bool) -> Place | None:
    """Return the split and class that the `folders` above an image stand for; None outside of the class folders.

    If there are `classes_only`, all images are for training. A class folder may contain folders of the kinds of
    pneumonia, such as `PNEUMONIA/BACTERIA`.
    """
    if len(folders) > 1 and read_kind(folders[-1]) and read_class(folders[-2]):
        folders = folders[:-1]
    if classes_only:
        return Place('train', folders[0]) if len(folders) == 1 else None
    if len(folders) == 2 and (split := read_split(folders[0])):
        return Place(split, folders[1])
    return None


def outside_reason(folders: tuple[str, ...]) -> str:
    """Return why an image that `read_place` has no place for is left out."""
    top_folder = folders[0] if folders else ''
    return OTHER_FOLDERS.get(fold(top_folder), OUTSIDE)


def check_spellings(images: Iterable[Path], base: Path, classes_only: bool, mapped: Collection[str]) -> None:
    """Raise `UsageError` if two folders have images of the same split, or of the same class in a split.

    The `images` have a place below the folder `base` of the splits. Two spellings, such as `val` and `validation`, may
    be copies of one another. Classes in `mapped` were joined on purpose, by `classes.json`.
    """
    spellings: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parent in {image.parent for image in images}:
        names = parent.relative_to(base).parts
        place = read_place(names, classes_only)
        if place is None:
            continue
        if not classes_only:
            spellings[f'split {place.split}',].add(names[0])
        label = read_class(place.label)
        if label and place.label not in mapped:
            spellings[f'class {label}', place.split].add(place.label)
    for (meaning, *_), same in sorted(spellings.items()):
        if len(same) > 1:
            folders = ' and '.join(map(repr, sorted(same)))
            raise UsageError(
                f'{base}: the folders {folders} both stand for the {meaning}. Join them, or move one of them elsewhere.'
            )
