"""Lists of images: tables as spreadsheet programs write them, and names in lines, as shells write them."""

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
from cxr_fastai.core.paths import FOREIGN_PATH, is_windows_path
from cxr_fastai.images.decode import sniff
from cxr_fastai.images.formats import ARCHIVES, SPREADSHEET, name_foreign_format

if TYPE_CHECKING:
    import pandas as pd  # imported by the functions that use it: prediction with a bundle must not load pandas

DELIMITERS = ',;\t|'
DELIMITER_LINE = re.compile(r'"?sep=(?P<delimiter>[,;\t|])"?', re.IGNORECASE)
"""First line by which spreadsheet programs name the delimiter."""
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
KAGGLE_FILE = 'data/chest_xray.download/archive.zip'
KAGGLE_COMMAND = 'cxr-fastai data download data/chest_xray --source kaggle'
"""Where to put the zip file that Kaggle offers, and the command that unpacks it."""
MAX_LISTING = 2**29
"""Largest CSV file of images, in bytes."""
POWERSHELL_COLUMNS = ('"FullName"', '"Name"', '"Path"')
"""Headings that `ConvertTo-Csv` of PowerShell writes above the names of files."""
MAX_ROWS_LISTED = 10
"""Largest number of row numbers in an error message."""


def read_names(data: bytes, folder: Path, source: str) -> list[str]:
    """Return the file names in `data`, the contents of a list that is called `source` in errors.

    The names are relative to `folder`: one per line, separated by NUL bytes as `find -print0` writes them, or in the
    column `path` of a table. Blank lines and comments (`# ...`) are left out, unless a file has such a name. The
    encoding is UTF-8 or UTF-16, with or without BOM; other bytes are kept as they are.
    """
    text = _decode_utf16(data)
    if text is None:
        text = os.fsdecode(data.removeprefix(codecs.BOM_UTF8))
    if '\0' in text:
        return [name for name in text.split('\0') if name.strip()]
    if _is_table(text, folder):
        return list(_parse(source, text).path.dropna())
    lines = [line for line in _split_lines(text) if line.strip()]
    return [line for line in _without_heading(lines) if not _is_left_out(line.strip(), folder)]


def _split_lines(text: str) -> list[str]:
    if '\n' not in text:
        return text.split('\r')
    return [line.rstrip('\r') for line in text.split('\n')]


def _without_heading(lines: list[str]) -> list[str]:
    """Return `lines` without the heading of a column as PowerShell writes it.

    It is a name with dashes below it, or, from `ConvertTo-Csv`, the name alone in quotes, perhaps below a line `#TYPE`.
    """
    if lines and lines[0].startswith('#TYPE'):
        lines = lines[1:]
    if lines and lines[0].strip() in POWERSHELL_COLUMNS:
        return lines[1:]
    has_heading = len(lines) > 1 and set(lines[1].strip()) == {'-'}
    return lines[2:] if has_heading else lines


def _is_left_out(line: str, folder: Path) -> bool:
    """Return whether a line is a comment or names the delimiter, and is not the name of a file."""
    is_note = line.startswith('#') or DELIMITER_LINE.fullmatch(line) is not None
    return is_note and not os.path.lexists(folder / line)


def _is_table(text: str, folder: Path) -> bool:
    """Return whether the first line is a header with the column `path`, and not the name of a file."""
    try:
        number, delimiter = _read_preamble(text)
    except ValueError:
        return False
    header = text.splitlines()[number].strip()
    names = [name.strip(' "').lower() for name in header.split(delimiter)]
    return 'path' in names and not os.path.lexists(folder / header)


def read_listing(path: Path, required: tuple[str, ...] = ('path', 'label')) -> pd.DataFrame:
    """Read the CSV file `path` as text: one row per image, indexed by row number (the first row is row 1).

    The encoding is UTF-8 or UTF-16 (with or without BOM) or Windows-1252; the delimiter a comma, semicolon, tab or `|`;
    the header may be in upper case. Blank rows and comments (`# ...`) are left out, `sep=;` may precede the header, and
    cells without a name may follow the last column; they are not read. Cells are stripped; empty cells are NaN. Raises
    `UsageError` if the file is not a table or if a `required` column is missing or has empty cells.
    """
    data = read_bytes(path, MAX_LISTING)
    _check_format(path, data)
    try:
        table = _parse(str(path), _decode(data))
    except (ValueError, csv.Error) as error:
        raise UsageError(
            f'{path}: not a CSV file with the columns {",".join(required)}[,split,patient] ({error}).'
        ) from None
    missing = [name for name in required if name not in table]
    if missing:
        names = ', '.join(map(str, table))
        raise UsageError(
            f'{path}: has no column {" or ".join(missing)}. The first row must name the columns, but contains '
            f'{names!r:.80}.'
        )
    for name in required:
        empty = table[name].isna()
        if empty.any():
            raise UsageError(f'{path}: no {name} in {describe_rows(empty)}. Fill the empty cells.')
    return table


def _check_format(path: Path, data: bytes) -> None:
    """Raise `UsageError`, which says what to do, if the file `path` with the contents `data` is no text at all."""
    form = name_foreign_format(data)
    if form == SPREADSHEET:
        raise UsageError(f'{path}: a spreadsheet, not a CSV file. Save it as CSV, and name that file.')
    if form in ARCHIVES:
        raise UsageError(
            f'{path}: an archive ({form}), not a folder or a CSV file of images. Unpack it and name the folder; or '
            f'save the zip of Kaggle as {KAGGLE_FILE} and run `{KAGGLE_COMMAND}`.'
        )
    if form is None and sniff(data) != '?':
        form = sniff(data)
    if form is not None:
        raise UsageError(f'{path}: a file in the format {form}, not a CSV file. Name a folder or a CSV file of images.')


def _decode(data: bytes) -> str:
    text = _decode_utf16(data)
    if text is not None:
        return text
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError:
        return data.decode('cp1252')


def _decode_utf16(data: bytes) -> str | None:
    """Return the text of UTF-16 `data`, with or without BOM; None for another encoding.

    Without BOM, every second byte of ASCII text is zero. A list of names that NUL bytes separate has names of more than
    one letter, such as those that contain a dot.
    """
    if data.startswith(UTF16_MARKS):
        return data.decode('utf-16', 'replace')
    first, second = data[0:512:2], data[1:512:2]
    if len(data) % 2 == 0 and b'.' in data:
        if second and not any(second) and all(first):
            return data.decode('utf-16-le', 'replace')
        if first and not any(first) and all(second):
            return data.decode('utf-16-be', 'replace')
    return None


def _parse(source: str, text: str) -> pd.DataFrame:
    import pandas as pd

    preamble, delimiter = _read_preamble(text)
    lines = StringIO(text, newline='')
    for _ in range(preamble):
        lines.readline()
    rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
    if _is_quoted_as_a_whole(rows):
        return _parse(source, '\n' * preamble + '\n'.join(''.join(row) for row in rows))
    names = rows.pop(0)
    header = [name.lower() for name in _strip_row(names)]
    repeated = sorted(name for name, n in Counter(header).items() if n > 1)
    if repeated:
        raise UsageError(f'{source}: the header names the column {", ".join(repeated)} twice.')
    numbers = range(preamble + 2, preamble + 2 + len(rows))
    table = pd.Series([_strip_row(row) for row in rows], numbers, dtype=object)
    table = table[[not _is_comment_row(row, header) for row in table]]
    too_long = table.map(len) > len(names)
    if too_long.any():
        raise UsageError(f'{source}: more cells than the header in {describe_rows(too_long)}.')
    named = [row[: len(header)] for row in table]
    cells = [[*map(_parse_cell, row)] + [None] * (len(header) - len(row)) for row in named]
    return pd.DataFrame(cells, table.index, header, dtype=object).dropna(how='all')


def _is_quoted_as_a_whole(rows: list[list[str]]) -> bool:
    """Return whether each row is one cell with all cells of the row in it, as in a table pasted into one column."""
    [header, *_] = rows
    has_delimiter = any(delimiter in header[0] for delimiter in DELIMITERS) if header else False
    return has_delimiter and all(len(row) < 2 for row in rows)


def _is_comment_row(row: list[str], header: list[str]) -> bool:
    """Return whether `row` is a comment (`# ...`) between the rows of a table, and not an image named with `#`."""
    if not row or not row[0].startswith('#') or header[0].startswith('#'):
        return False
    return row[0].startswith('# ') or (len(row) == 1 and len(header) > 1)


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
    return line.startswith(('#', '"#')) and 'path' not in re.split('[",;\\t|]+', line.lower())[1:]


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
    if not missing.any():
        return
    first = table.path[missing].iloc[0]
    advice = f'{first} is {FOREIGN_PATH}' if is_windows_path(first) else f'Paths are relative to {folder}'
    raise UsageError(f'{path}: no such file in {describe_rows(missing)}. {advice}.')


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
