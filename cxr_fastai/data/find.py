"""A CSV that lists films (path, label, split, patient) becomes a table, or one line that says what is wrong with it."""
from __future__ import annotations

import codecs
import csv
import os
from io import StringIO
from pathlib import Path

import pandas as pd

from cxr_fastai.core.files import UsageError

SHOWN = 10
"""Row numbers in a complaint; the header is row 1."""
DELIMITERS = ',;\t'


def read_listing(path: Path, needed: tuple[str, ...] = ('path', 'label')) -> pd.DataFrame:
    """The columns of the CSV `path` as text, stripped, with its row numbers as index; empty cells are NaN.

    UTF-8 (with or without BOM), UTF-16 and Windows-1252; delimited by comma, semicolon or tab; header in any case.
    Raises `UsageError` where that does not make a table with the columns `needed`, filled in every row.
    """
    try: table = _parse(path, _text(path))
    except (ValueError, csv.Error, OSError, UnicodeError) as error:
        raise UsageError(f'{path}: not a CSV with the columns {",".join(needed)}[,split,patient] ({error}).') from None
    if missing := [name for name in needed if name not in table]:
        raise UsageError(f'{path}: has no column {" or ".join(missing)}: its first row has to name the columns.')
    for name in needed:
        if (empty := table[name].isna()).any(): raise UsageError(f'{path}: no {name} in {rows_where(empty)}.')
    return table


def check_files(table: pd.DataFrame, path: Path) -> None:
    """Raise `UsageError` where a film that the CSV `path` lists is not there."""
    absent = pd.Series([not os.path.isfile(path.parent/film) for film in table.path], table.index)
    if absent.any(): raise UsageError(f'{path}: no such file in {rows_where(absent)}; paths count from {path.parent}.')


def drop_repeats(table: pd.DataFrame, path: Path) -> tuple[pd.DataFrame, int]:
    """`table` without rows that say again what another said, and their number. Raises `UsageError` where `path` lists
    a film with two labels."""
    labels = table.groupby('path').label.transform('nunique')
    if (both := labels > 1).any():
        raise UsageError(f'{path}: the same film has two labels in {rows_where(both)}.')
    again = table.duplicated(['path', 'split'])
    return table[~again], int(again.sum())


def rows_where(wrong: pd.Series) -> str:
    """The first numbers of the rows that are `wrong`, and how many there are."""
    rows = [str(row) for row in wrong.index[wrong][:SHOWN]]
    total = int(wrong.sum())
    return f'row{"s" if total > 1 else ""} {", ".join(rows)}' + (f' ({total:,} in all)' if total > SHOWN else '')


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)): return data.decode('utf-16')
    try: return data.decode('utf-8-sig')
    except UnicodeDecodeError: return data.decode('cp1252')


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
    cells = [[cell.strip() or None for cell in row] + [None]*(len(names) - len(row)) for row in rows]
    return pd.DataFrame(cells, lengths.index, names, dtype=object).dropna(how='all')
