"""Lists of images: CSV files as spreadsheet programs write them, and file names on standard input."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import unescape_formula
from cxr_fastai.core.foreign import read_bytes

if TYPE_CHECKING:
    import pandas as pd  # imported by the functions that use it: prediction with a bundle must not load pandas

DELIMITERS = ',;\t'
DELIMITER_LINE = re.compile('"?sep=(?P<delimiter>[,;\\t])"?', re.IGNORECASE)
"""First line by which spreadsheet programs name the delimiter."""
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_LISTING = 2**29
"""Largest CSV file of images, in bytes."""
MAX_ROWS_LISTED = 10
"""Largest number of row numbers in an error message."""


def split_names(data: bytes) -> list[str]:
    """Return the file names in `data`, one per line, or separated by NUL bytes as `find -print0` writes them.

    PowerShell writes UTF-16, and Windows programs put a BOM before UTF-8.
    """
    if data.startswith(UTF16_MARKS):
        data = data.decode('utf-16', 'replace').encode()
    names = data.removeprefix(codecs.BOM_UTF8)
    lines = names.split(b'\0') if b'\0' in names else [line.rstrip(b'\r') for line in names.split(b'\n')]
    return [os.fsdecode(line) for line in lines if line.strip()]


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
