"""Which names of files, folders and patients may be shown: those that cannot be a person's."""
from __future__ import annotations

import re
from pathlib import PurePosixPath

from cxr_fastai.images.decode import SUFFIXES

KNOWN_WORDS = {
    'anon', 'ap', 'bacteria', 'chest', 'chncxr', 'copy', 'covid', 'cr', 'crop', 'cxr', 'data', 'dataset', 'demo',
    'dicom', 'dx', 'exam', 'faulty', 'film', 'films', 'folder', 'frontal', 'id', 'im', 'image', 'images', 'img',
    'kaggle', 'lateral', 'left', 'masks', 'mcucxr', 'medmnist', 'normal', 'original', 'originals', 'pa', 'patient',
    'person', 'pneumonia', 'ray', 'right', 'sample', 'scan', 'series', 'set', 'study', 'subset', 'test', 'train',
    'unknown', 'val', 'valid', 'view', 'virus', 'xray'}
"""Words that name nobody; a name that has another word in it may be a person's."""
HASH = re.compile(r'[0-9a-f]{8,}(-[0-9a-f]{4,})*')
WORD = re.compile(r'[^\W\d_]+')


def is_safe(name: str) -> bool:
    """Whether `name` has only known words, single Latin letters and numbers, or is a hash."""
    words = (word for word in WORD.findall(name) if len(word) > 1 or not word.isascii())
    return bool(HASH.fullmatch(name)) or '^' not in name and all(word.casefold() in KNOWN_WORDS for word in words)


def safe_name(name: str, stand_in: str) -> str:
    """`name` as it may be shown, or `stand_in`."""
    return name if is_safe(name) else stand_in


def short_path(path: str) -> str:
    """`path` without the folders above its own two, where they are not those of the data root: of one that is absolute
    or leads out of it."""
    parts = PurePosixPath(path).parts
    return '/'.join(parts[-3:]) if path.startswith('/') or '..' in parts else path


def safe_path(path: str, number: int) -> str:
    """`path` as it may be shown: from the first part that may be a person's name on, `film-` and `number` instead."""
    *folders, file = PurePosixPath(path).parts
    suffix = PurePosixPath(file).suffix
    if suffix.lower() not in SUFFIXES: suffix = ''  # the end of a name with a full stop in it
    safe = [is_safe(folder) for folder in folders] + [is_safe(file.removesuffix(suffix))]
    if all(safe): return path
    return '/'.join([*folders[:safe.index(False)], f'film-{number}{suffix}'])
