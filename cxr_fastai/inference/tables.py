"""Rows go to disk as they come; what is there is a whole file at any time."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cxr_fastai.core.errors import OutputError, UsageError
from cxr_fastai.core.files import atomic, writing

Row = dict[str, Any]
FORMULA = ('=', '+', '-', '@', '\t', '\r', '\0')
"""First letters that make a spreadsheet reckon with a text."""


class CsvRows:
    """A CSV with the columns of its first row; a text that a spreadsheet would take for a formula gets a `'` first."""

    end = b''
    """What stands behind the last row."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns

    def start(self) -> None:
        """Begin the file."""
        with atomic(self.path) as temporary:
            temporary.write_bytes(_lines([self.columns]))

    def add(self, rows: Sequence[Row]) -> None:
        """Put `rows` behind those that are there."""
        self._append(_lines([_plain(row[name]) for name in self.columns] for row in rows))

    def read(self) -> list[Row]:
        """The rows that are there; empty cells are None, numbers and the rest are text. Raises `ValueError` where it is
        no such table."""
        with open(self.path, encoding='utf-8', newline='') as file:
            try:
                names, *lines = csv.reader(file)
            except csv.Error as error:
                raise ValueError(str(error)) from None
        _check_columns([names], self.columns)
        return [dict(zip(self.columns, (_unescaped(cell) for cell in line), strict=True)) for line in lines]

    def close(self) -> None:
        """Write what is not written yet."""

    def _append(self, data: bytes, between: bytes = b'') -> None:
        """Put `data` behind the rows that are there; a disk that is full in the midst of it leaves these."""
        with writing(self.path):
            at = self.path.stat().st_size - len(self.end)
        if at > 1:
            data = between + data
        try:
            with writing(self.path), open(self.path, 'rb+') as file:
                file.seek(at)
                file.write(data + self.end)
        except OutputError:
            with suppress(OSError):
                os.truncate(self.path, at)
                with open(self.path, 'ab') as file:
                    file.write(self.end)
            raise


class JsonRows(CsvRows):
    """A JSON array of objects, whose texts are as they are."""

    end = b'\n]\n'

    def start(self) -> None:
        """Begin the file."""
        with atomic(self.path) as temporary:
            temporary.write_bytes(b'[' + self.end)

    def add(self, rows: Sequence[Row]) -> None:
        """Put `rows` behind those that are there."""
        lines = ',\n'.join(json.dumps(row, allow_nan=False) for row in rows)
        if rows:
            self._append(f'\n{lines}'.encode(), b',')

    def read(self) -> list[Row]:
        """The rows that are there. Raises `ValueError` where it is no such table."""
        rows = json.loads(self.path.read_text(encoding='utf-8'))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError('no array of objects')
        _check_columns(rows, self.columns)
        return rows


class ParquetRows(CsvRows):
    """A Parquet table, written anew whenever `EVERY` rows are new, and at the end."""

    EVERY = 2000

    def start(self) -> None:
        """Begin the file."""
        self.rows: list[Row] = []
        self.written = 0
        self.close()

    def add(self, rows: Sequence[Row]) -> None:
        """Put `rows` behind those that are there."""
        self.rows += rows
        if len(self.rows) - self.written >= self.EVERY:
            self.close()

    def read(self) -> list[Row]:
        """The rows that are there. Raises `ValueError` where it is no such table."""
        import pandas as pd

        table = pd.read_parquet(self.path).astype(object)
        _check_columns([table], self.columns)
        self.rows = table.where(table.notna(), None).to_dict('records')
        self.written = len(self.rows)
        return self.rows

    def close(self) -> None:
        """Write what is not written yet."""
        import pandas as pd

        kinds = {name: 'float64' if name in ('p_pneumonia', 'threshold') else 'string' for name in self.columns}
        table = pd.DataFrame(self.rows, columns=list(self.columns)).astype(kinds)
        with atomic(self.path) as temporary:
            table.to_parquet(temporary, index=False)
        self.written = len(self.rows)


KINDS = {'.csv': CsvRows, '.json': JsonRows, '.parquet': ParquetRows}
"""The end of a file's name -> what writes it."""


def open_rows(path: Path, columns: Sequence[str]) -> CsvRows:
    """What writes the file `path`, by its name. Raises `UsageError` for a name that is none of `KINDS`, or where the
    package for it is missing."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f'--out {path}: its name has to end in {", ".join(KINDS)}.')
    if kind is ParquetRows:
        from importlib.util import find_spec

        if not find_spec('pyarrow'):
            raise UsageError(f'--out {path}: needs pip install "cxr_fastai[parquet]".')
    return kind(path, columns)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    """`rows` as CSV. (Where lines do not end in a carriage return, older `csv` do not quote a cell with one.)"""
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append), lineterminator='\r\n').writerows(rows)
    return ''.join(f'{line[:-2]}\n' for line in lines).encode('utf-8', 'backslashreplace')


def _plain(value: Any) -> Any:
    if isinstance(value, str) and _reckons(value):
        return f"'{value}"
    return '' if value is None else value


def _unescaped(cell: str) -> str | None:
    return (cell[1:] if cell[:1] == "'" and _reckons(cell) else cell) or None


def _reckons(text: str) -> bool:
    """Whether `text` is a formula, or one behind a `'`, which needs another to be told from it."""
    return text.lstrip("'").startswith(FORMULA)


def _check_columns(rows: Iterable[Iterable[str]], columns: Sequence[str]) -> None:
    """Raise `ValueError` unless each of `rows` has the `columns`."""
    if any(list(row) != list(columns) for row in rows):
        raise ValueError('other columns')
