"""Which files are images: in folders, CSV lists and on the command line."""

from __future__ import annotations

import codecs
import csv
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from io import StringIO
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

import pandas as pd

from cxr_fastai.core.errors import UsageError
from cxr_fastai.images.decode import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd


def find_images(folder: Path) -> tuple[list[Path], Counter]:
    """Images below `folder`, sorted, and a count of what was ignored, by reason. Links are not followed, to folders or
    to images: they may lead in circles or out of the folder. (A CSV may list them.)"""
    images, ignored = [], Counter()
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(base, name)
            reason = junk(path.relative_to(folder)) or ('link' if path.is_symlink() else None)
            if reason:
                ignored[reason] += 1
            else:
                images.append(path)
    return images, ignored


def junk(path: PurePath) -> str | None:
    """Why the file `path` is no image, by its name; None where it may be one."""
    if '__MACOSX' in path.parts:
        return '__MACOSX'
    if path.name.startswith('._'):
        return '._*'
    if path.name == '.DS_Store':
        return '.DS_Store'
    return None if path.suffix.lower() in SUFFIXES else 'not an image'


SHOWN = 10
"""Row numbers in a complaint; the header is row 1."""
DELIMITERS = ',;\t'


def read_listing(path: Path, needed: tuple[str, ...] = ('path', 'label')) -> pd.DataFrame:
    """The columns of the CSV `path` as text, stripped, with its row numbers as index; empty cells are NaN.

    UTF-8 (with or without BOM), UTF-16 and Windows-1252; delimited by comma, semicolon or tab; header in any case.
    Raises `UsageError` where that does not make a table with the columns `needed`, filled in every row.
    """
    try:
        table = _parse(path, _text(path))
    except (ValueError, csv.Error, OSError, UnicodeError) as error:
        raise UsageError(f'{path}: not a CSV with the columns {",".join(needed)}[,split,patient] ({error}).') from None
    if missing := [name for name in needed if name not in table]:
        raise UsageError(f'{path}: has no column {" or ".join(missing)}: its first row has to name the columns.')
    for name in needed:
        if (empty := table[name].isna()).any():
            raise UsageError(f'{path}: no {name} in {rows_where(empty)}.')
    return table


def check_files(table: pd.DataFrame, path: Path) -> None:
    """Raise `UsageError` where an image that the CSV `path` lists is not there."""
    absent = pd.Series([not os.path.isfile(path.parent / image) for image in table.path], table.index)
    if absent.any():
        raise UsageError(f'{path}: no such file in {rows_where(absent)}; paths count from {path.parent}.')


def drop_repeats(table: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, int]:
    """`table` without rows that say again what another said, and their number. Raises `UsageError` where `path` lists
    an image with two labels."""
    labels = table.groupby('path').label.transform('nunique')
    if (both := labels > 1).any():
        raise UsageError(f'{path}: the same image has two labels in {rows_where(both)}.')
    again = table.duplicated(['path', 'split'])
    return table[~again], int(again.sum())


def rows_where(wrong: pd.Series) -> str:
    """The first numbers of the rows that are `wrong`, and how many there are."""
    rows = [str(row) for row in wrong.index[wrong][:SHOWN]]
    total = int(wrong.sum())
    return f'row{"s" if total > 1 else ""} {", ".join(rows)}' + (f' ({total:,} in all)' if total > SHOWN else '')


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode('utf-16')
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        return data.decode('cp1252')


def _parse(path: Path, text: str) -> pd.DataFrame:
    header = text.split('\n', 1)[0]
    delimiter = max(DELIMITERS, key=header.count)
    names, *rows = csv.reader(StringIO(text, newline=''), delimiter=delimiter, strict=True)
    names = [name.strip().lower() for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f'{path}: its header has the column {", ".join(twice)} twice.')
    lengths = pd.Series([len(row) for row in rows], range(2, len(rows) + 2), dtype=int)
    if (long := lengths > len(names)).any():
        raise UsageError(f'{path}: more cells than the header has in {rows_where(long)}.')
    cells = [[cell.strip() or None for cell in row] + [None] * (len(names) - len(row)) for row in rows]
    return pd.DataFrame(cells, lengths.index, names, dtype=object).dropna(how='all')


KNOWN_WORDS = {
    'anon',
    'ap',
    'bacteria',
    'chest',
    'chncxr',
    'copy',
    'covid',
    'cr',
    'crop',
    'cxr',
    'data',
    'dataset',
    'demo',
    'dicom',
    'dx',
    'exam',
    'faulty',
    'image',
    'images',
    'folder',
    'frontal',
    'id',
    'im',
    'img',
    'kaggle',
    'lateral',
    'left',
    'masks',
    'mcucxr',
    'medmnist',
    'normal',
    'original',
    'originals',
    'pa',
    'patient',
    'person',
    'pneumonia',
    'ray',
    'right',
    'sample',
    'scan',
    'series',
    'set',
    'study',
    'subset',
    'test',
    'train',
    'unknown',
    'val',
    'valid',
    'view',
    'virus',
    'xray',
}
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
    """`path` as it may be shown: from the first part that may be a person's name on, `image-` and `number` instead."""
    *folders, file = PurePosixPath(path).parts
    suffix = PurePosixPath(file).suffix
    if suffix.lower() not in SUFFIXES:
        suffix = ''  # the end of a name with a full stop in it
    safe = [is_safe(folder) for folder in folders] + [is_safe(file.removesuffix(suffix))]
    if all(safe):
        return path
    return '/'.join([*folders[: safe.index(False)], f'image-{number}{suffix}'])


def list_images(sources: Iterable[Path]) -> list[Path]:
    """The images that `sources` mean: files as they are, folders with all images below them, sorted, what a CSV has in
    its column path, and for `-` what standard input has, a line each. Raises `UsageError` where there are none."""
    images = []
    for source in sources:
        found = _list(source)
        if not found:
            raise UsageError(f'{source}: no images there (links are not followed).')
        images += found
    return images


def _list(source: Path) -> list[Path]:
    if str(source) == '-':
        return [Path(os.fsdecode(line.rstrip(b'\r\n'))) for line in sys.stdin.buffer if line.strip()]
    if os.path.isdir(source):
        return find_images(source)[0]  # a Path would raise where the name is too long
    if source.suffix.lower() != '.csv':
        return [source]
    return [source.parent / path for path in read_listing(source, ('path',)).path]
