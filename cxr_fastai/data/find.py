"""Find images in folders, in CSV files and among command-line arguments."""

from __future__ import annotations

import codecs
import csv
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from io import StringIO
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, unescape_formula
from cxr_fastai.core.foreign import read_bytes
from cxr_fastai.images.decode import SUFFIXES

if TYPE_CHECKING:
    import pandas as pd  # imported by the functions that use it: prediction with a bundle must not load pandas

DELIMITERS = ',;\t'
DELIMITER_LINE = re.compile('"?sep=(?P<delimiter>[,;\\t])"?', re.IGNORECASE)
"""First line by which spreadsheet programs name the delimiter."""
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NOT_AN_IMAGE = 'not an image'
IMAGE_MARKS = (b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'II*\0', b'MM\0*')
"""First bytes of JPEG, PNG and TIFF files."""
DICOM_MARK = b'DICM'
MARK_BYTES = 132
"""The length of a DICOM preamble and `DICOM_MARK`."""
MAX_LISTING = 2**29
"""Largest CSV file of images, in bytes."""
MAX_ROWS_LISTED = 10
"""Largest number of row numbers in an error message."""


def list_images(sources: StrPath | Iterable[StrPath]) -> list[Path]:
    """Return the images that `sources` name, one or several paths, as the arguments of a command do.

    Each source is an image file, a folder (all images below it, sorted), a CSV file (the images in its column `path`)
    or `-` (one path per line of standard input). Warns of files in folders that are left out, with counts
    by reason. Raises `UsageError` for a source without images.
    """
    images = []
    for source in [sources] if isinstance(sources, str | os.PathLike) else sources:
        images_of_source = _list_source(Path(source))
        if not images_of_source:
            raise UsageError(f'{source}: no images found (links that lead out of the folder are not followed).')
        images += images_of_source
    return images


def _list_source(source: Path) -> list[Path]:
    if str(source) == '-':
        return [Path(name) for name in _split_names(sys.stdin.buffer.read())]
    if os.path.isdir(source):  # Path.is_dir raises for a name that is too long
        images, ignored = find_images(source)
        if ignored:
            counts = ', '.join(f'{n:,} {reason}' for reason, n in ignored.items())
            warnings.warn(f'{source}: files left out: {counts}', CXRWarning, stacklevel=3)
        return images
    if source.suffix.lower() == '.csv':
        return [source.parent / path for path in read_listing(source, ('path',)).path]
    return [source]


def _split_names(data: bytes) -> list[str]:
    """Return the file names in `data`, one per line, or separated by NUL bytes as `find -print0` writes them.

    PowerShell writes UTF-16, and Windows programs put a BOM before UTF-8.
    """
    if data.startswith(UTF16_MARKS):
        data = data.decode('utf-16', 'replace').encode()
    names = data.removeprefix(codecs.BOM_UTF8)
    lines = names.split(b'\0') if b'\0' in names else [line.rstrip(b'\r') for line in names.split(b'\n')]
    return [os.fsdecode(line) for line in lines if line.strip()]


def find_images(folder: StrPath) -> tuple[list[Path], Counter[str]]:
    """Return the images below `folder`, sorted, and the number of ignored files by reason.

    A file without a known suffix is an image if its content begins like one. Symbolic links are followed if they lead
    to a place below `folder` that is not above the link; others are ignored: they can form a cycle or lead out.
    """
    folder = Path(folder)
    images: list[Path] = []
    ignored: Counter[str] = Counter()
    followed: set[str] = set()
    for base, subfolders, names in os.walk(folder, followlinks=True):
        links = [name for name in subfolders if _is_stray_link(Path(base, name), folder, followed)]
        ignored['link'] += len(links)
        subfolders[:] = sorted(set(subfolders) - set(links))
        for name in sorted(names):
            path = Path(base, name)
            reason = ignore_reason(path.relative_to(folder))
            if _is_stray_link(path, folder, followed):
                reason = 'link'
            elif reason == NOT_AN_IMAGE:
                reason = _reason_by_content(path)
            if reason:
                ignored[reason] += 1
            else:
                images.append(path)
    return images, +ignored


def _is_stray_link(path: Path, folder: Path, followed: set[str]) -> bool:
    """Return whether `path` is a link that leads out of `folder`, to a folder above it, or where another link led.

    Another link to a folder is added to `followed`. `path` may itself be below a link that was followed.
    """
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    above = [
        os.path.realpath(parent) for parent in (path.parent, *path.parent.parents) if parent.is_relative_to(folder)
    ]
    if any(os.path.commonpath([target, parent]) == target for parent in above):
        return True
    if os.path.commonpath([target, above[-1]]) != above[-1] or target in followed:
        return True
    if os.path.isdir(target):
        followed.add(target)
    return False


def _reason_by_content(path: Path) -> str | None:
    """Return why the file `path`, whose suffix is unknown, is not an image that can be read; None if it is one."""
    if not path.is_file():
        return NOT_AN_IMAGE
    try:
        with path.open('rb') as file:
            start = file.read(MARK_BYTES)
    except OSError:
        return 'unreadable'
    if start.startswith(IMAGE_MARKS) or start.endswith(DICOM_MARK):
        return None
    return NOT_AN_IMAGE


def ignore_reason(path: PurePath) -> str | None:
    """Return why a file cannot be an image, judged by its `path` alone; None if it can be one."""
    if '__MACOSX' in path.parts:
        return '__MACOSX'
    if path.name.startswith('._'):
        return '._*'
    if path.name == '.DS_Store':
        return '.DS_Store'
    if path.suffix.lower() not in SUFFIXES:
        return NOT_AN_IMAGE
    return None


def read_listing(path: Path, required: tuple[str, ...] = ('path', 'label')) -> pd.DataFrame:
    """Read the CSV file `path` as text: one row per image, indexed by row number (the first row is row 1).

    The encoding is UTF-8 (with or without BOM), UTF-16 or Windows-1252; the delimiter a comma, semicolon or tab; the
    header may be in upper case. Blank rows, comments (`# ...`) and `sep=;` may precede it, and cells without a name may
    follow the last column; they are not read. Cells are stripped; empty cells are NaN. Raises `UsageError` if the file
    is not a table or if a `required` column is missing or has empty cells.
    """
    try:
        table = _parse(path, _decode(read_bytes(path, MAX_LISTING)))
    except (ValueError, csv.Error) as error:
        raise UsageError(
            f'{path}: not a CSV file with the columns {",".join(required)}[,split,patient] ({error}).'
        ) from None
    missing = [name for name in required if name not in table]
    if missing:
        raise UsageError(f'{path}: has no column {" or ".join(missing)}. The first row must name the columns.')
    for name in required:
        empty = table[name].isna()
        if empty.any():
            raise UsageError(f'{path}: no {name} in {describe_rows(empty)}. Fill the empty cells.')
    return table


def _decode(data: bytes) -> str:
    if data.startswith(UTF16_MARKS):
        return data.decode('utf-16')
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        return data.decode('cp1252')


def _parse(path: Path, text: str) -> pd.DataFrame:
    import pandas as pd

    preamble, delimiter = _read_preamble(text)
    lines = StringIO(text, newline='')
    for _ in range(preamble):
        lines.readline()
    rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    names = rows.pop(0)
    header = [name.lower() for name in _strip_row(names)]
    repeated = sorted(name for name, n in Counter(header).items() if n > 1)
    if repeated:
        raise UsageError(f'{path}: the header names the column {", ".join(repeated)} twice.')
    first_row = preamble + 2
    rows = [_strip_row(row) for row in rows]
    lengths = pd.Series([len(row) for row in rows], range(first_row, first_row + len(rows)), dtype=int)
    too_long = lengths > len(names)
    if too_long.any():
        raise UsageError(f'{path}: more cells than the header in {describe_rows(too_long)}.')
    named = [row[: len(header)] for row in rows]
    cells = [[*map(_parse_cell, row)] + [None] * (len(header) - len(row)) for row in named]
    return pd.DataFrame(cells, lengths.index, header, dtype=object).dropna(how='all')


def _read_preamble(text: str) -> tuple[int, str]:
    """Return the number of lines before the header of the table `text`, and the delimiter of its cells."""
    named = None
    for number, line in enumerate(StringIO(text, newline='')):
        content = line.strip('\r\n ')
        match = DELIMITER_LINE.fullmatch(content)
        if match:
            named = match['delimiter']
        elif content.strip(DELIMITERS) and not _is_comment(content):
            return number, named or max(DELIMITERS, key=line.count)
    raise ValueError('the file is empty')


def _is_comment(line: str) -> bool:
    """Return whether `line` is a comment, and not a header whose first column is `#` or begins with it."""
    return line.startswith(('#', '"#')) and 'path' not in re.split('[",;\\t]+', line.lower())[1:]


def _strip_row(row: list[str]) -> list[str]:
    """Return the cells of `row` without surrounding spaces and without the empty cells at its end."""
    cells = [cell.strip() for cell in row]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _parse_cell(cell: str) -> str | None:
    return unescape_formula(cell) or None


def check_files(table: pd.DataFrame, path: Path) -> None:
    """Raise `UsageError` if an image of `table`, from the CSV file or for the folder `path`, does not exist."""
    import pandas as pd

    folder = path if path.is_dir() else path.parent
    missing = pd.Series([not os.path.isfile(folder / image) for image in table.path], table.index)
    if missing.any():
        raise UsageError(f'{path}: no such file in {describe_rows(missing)}. Paths are relative to {folder}.')


def drop_repeated_rows(table: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, int]:
    """Return `table` without rows that repeat the path and split of an earlier row, and the number of dropped rows.

    Raises `UsageError` if the CSV file `path` lists an image with two labels.
    """
    conflicting = table.groupby('path').label.transform('nunique') > 1
    if conflicting.any():
        raise UsageError(f'{path}: the same image has two labels in {describe_rows(conflicting)}.')
    repeated = table.duplicated(['path', 'split'])
    return table[~repeated], int(repeated.sum())


def describe_rows(mask: pd.Series) -> str:
    """Return the numbers of the first rows where `mask` is true, and their count if there are more."""
    rows = [str(row) for row in mask.index[mask]]
    noun = 'row' if len(rows) == 1 else 'rows'
    text = f'{noun} {", ".join(rows[:MAX_ROWS_LISTED])}'
    if len(rows) > MAX_ROWS_LISTED:
        text += f' ({len(rows):,} in total)'
    return text


def shown_path(path: str, number: int, hide_names: bool = False) -> str:
    """Return the name of an image on a page that may be shared: its short path, or with `hide_names` its number.

    A file or folder name can contain a patient's name. `image-12.jpeg` stands for the image number 12.
    """
    if not hide_names:
        return short_path(path)
    suffix = PurePosixPath(path).suffix
    if suffix.lower() not in SUFFIXES:
        suffix = ''  # part of a name that contains a full stop
    return f'image-{number}{suffix}'


def short_path(path: str) -> str:
    """Return `path` if it is relative to the data root, else its last three parts.

    Absolute paths and paths that leave the data root would show folder names of the computer.
    """
    parts = PurePosixPath(path).parts
    if path.startswith('/') or '..' in parts:
        return '/'.join(parts[-3:])
    return path
