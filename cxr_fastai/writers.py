"""Rows go to disk as they come; what is there is a whole file at any time."""
from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from cxr_fastai.core import UsageError, atomic, writing

Row = dict[str, Any]
FORMULA = ('=', '+', '-', '@', '\t', '\r', '\0')
"""First letters that make a spreadsheet reckon with a text."""
END = b'\n]\n'


class CsvRows:
    """A CSV with the columns of its first row; a text that a spreadsheet would take for a formula gets a `'` first."""

    def __init__(self, path: Path, columns: Sequence[str]): self.path, self.columns = path, columns

    def start(self) -> None:
        """Begin the file."""
        self._append([self.columns], 'w')

    def add(self, rows: Sequence[Row]) -> None:
        """Put `rows` behind those that are there."""
        self._append([[_plain(row[name]) for name in self.columns] for row in rows], 'a')

    def read(self) -> list[Row]:
        """The rows that are there; empty cells are None, numbers and the rest are text."""
        with open(self.path, encoding='utf-8', newline='') as file: lines = list(csv.reader(file))
        if not lines or lines[0] != list(self.columns): raise ValueError('other columns')
        return [dict(zip(self.columns, (_unescaped(cell) for cell in line), strict=True)) for line in lines[1:]]

    def close(self) -> None:
        """Write what is not written yet."""

    def _append(self, lines: Sequence[Sequence[Any]], mode: str) -> None:
        csv.writer(buffer := StringIO(), lineterminator='\n').writerows(lines)
        with writing(self.path), open(self.path, f'{mode}b') as file:
            file.write(buffer.getvalue().encode('utf-8', 'backslashreplace'))


class JsonRows(CsvRows):
    """A JSON array of objects, whose texts are as they are."""

    def start(self) -> None:
        """Begin the file."""
        with writing(self.path): self.path.write_bytes(b'[' + END)

    def add(self, rows: Sequence[Row]) -> None:
        """Put `rows` behind those that are there."""
        lines = b',\n'.join(json.dumps(row, allow_nan=False).encode() for row in rows)
        if not rows: return
        with writing(self.path), open(self.path, 'rb+') as file:
            file.seek(-len(END), 2)
            first = file.tell() == 1
            file.write((b'\n' if first else b',\n') + lines + END)

    def read(self) -> list[Row]:
        """The rows that are there."""
        return json.loads(self.path.read_text(encoding='utf-8'))


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
        if len(self.rows) - self.written >= self.EVERY: self.close()

    def read(self) -> list[Row]:
        """The rows that are there."""
        import pandas as pd
        table = pd.read_parquet(self.path).astype(object)
        self.rows = table.where(table.notna(), None).to_dict('records')
        self.written = len(self.rows)
        return self.rows

    def close(self) -> None:
        """Write what is not written yet."""
        import pandas as pd
        kinds = {name: 'float64' if name in ('p_pneumonia', 'threshold') else 'string' for name in self.columns}
        table = pd.DataFrame(self.rows, columns=list(self.columns)).astype(kinds)
        with atomic(self.path) as temporary: table.to_parquet(temporary, index=False)
        self.written = len(self.rows)


KINDS = {'.csv': CsvRows, '.json': JsonRows, '.parquet': ParquetRows}
"""The end of a file's name -> what writes it."""


def open_rows(path: Path, columns: Sequence[str]) -> CsvRows:
    """What writes the file `path`, by its name. Raises `UsageError` for a name that is none of `KINDS`, or where the
    package for it is missing."""
    kind = KINDS.get(path.suffix.lower())
    if kind is None: raise UsageError(f'--out {path}: its name has to end in {", ".join(KINDS)}.')
    if kind is ParquetRows:
        from importlib.util import find_spec
        if not find_spec('pyarrow'): raise UsageError(f'--out {path}: needs pip install "cxr_fastai[parquet]".')
    return kind(path, columns)


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA): return f"'{value}"
    return '' if value is None else value


def _unescaped(cell: str) -> str | None: return (cell[1:] if cell[:1] == "'" and cell[1:2] in FORMULA else cell) or None
