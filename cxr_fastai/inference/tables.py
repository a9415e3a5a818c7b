"""`predict_to_table`, which predicts images and writes a table (CSV, JSON or Parquet) that is complete at any time."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cxr_fastai.core.environment import is_main_process, require_package
from cxr_fastai.core.errors import CXRError, OutputError, UsageError
from cxr_fastai.core.files import StrPath, atomic, escape_formula, unescape_formula, writing
from cxr_fastai.core.foreign import read_json, read_text
from cxr_fastai.core.recipe import POSITIVE, VOCAB
from cxr_fastai.images.decode import ImageLike
from cxr_fastai.images.decoder_pool import default_pool
from cxr_fastai.inference.distributed import broadcast, map_in_processes, process_group
from cxr_fastai.inference.predictor import COLUMNS, Predictor, Row, load_predictor, name_images
from cxr_fastai.inference.pretrained import find_model

MAX_BYTES = 2**31
"""Largest table that is read to be resumed, in bytes."""
MAX_DIFFERENCE = 2e-4
"""Largest difference of a probability that is computed again with the same network, perhaps by another engine."""
SAME_OPTIONS = 'Use the same model, options and images as before, or choose another --out.'
NUMBERS = ('p_pneumonia', 'threshold')
"""Columns that Parquet stores as numbers; the others are text."""


@dataclass(frozen=True)
class Predictions:
    """The result of `predict_to_table`: the rows of all images, and the predictor that computed them."""

    rows: list[Row]
    predictor: Predictor

    @property
    def positives(self) -> int:
        """The number of images that were classified as pneumonia."""
        return sum(row['prediction'] == VOCAB[POSITIVE] for row in self.rows)

    @property
    def scored(self) -> list[int]:
        """The positions of the rows with a probability."""
        return [position for position, row in enumerate(self.rows) if row['status'] == 'ok']

    @property
    def failures(self) -> list[Row]:
        """The rows of images without a probability, with the status `error` or `rejected`."""
        return [row for row in self.rows if row['status'] != 'ok']


def predict_to_table(
    model: StrPath,
    images: Sequence[ImageLike],
    table: StrPath | None = None,
    *,
    resume: bool = False,
    batch_size: int = 32,
    workers: int | None = None,
    calibrated: bool = False,
    threshold: float | None = None,
    tta: bool | None = None,
    use_gate: bool = True,
    engine: str = 'auto',
    device: str = 'auto',
    precision: str = 'fp32',
    modality: str = '',
) -> Predictions:
    """Predict `images` with `model` and write a row for each image to `table`, batch by batch.

    `model` and the options are those of `Predictor.load`, `images` those of `Predictor.predict`; `threshold` replaces
    that of the model. `tta` says whether images are predicted with test-time views (see `Predictor.with_tta`); None
    means with those that the threshold of the model was chosen with.

    `table` is a new `.csv`, `.json` or `.parquet` file with the columns `COLUMNS`; None writes nothing. If the process
    is interrupted, the rows of all finished batches are in the file, and `resume=True` continues it with the same
    model, options and images. An image that cannot be used gets a row with a code and a message.

    In a distributed run each process predicts a part of the images, and only the main process writes and returns rows.

    Raises `UsageError` if `table` exists already, or if it cannot be resumed with these arguments; `OutputError` if it
    cannot be written; `CXRError` if the model cannot be loaded.
    """
    table = Path(table) if table is not None else None
    model = find_model(model)
    with process_group():
        writer = None
        finished: list[Row] = []
        if is_main_process():
            writer, finished = _open_table(table, resume)
        finished, named = broadcast((finished, name_images(images)))
        _check_same_images(finished, [name for name, _ in named], table)
        default_pool().start(len(named) - len(finished))  # the processes start while the model is loaded
        predictor = load_predictor(
            model,
            calibrated=calibrated,
            threshold=threshold,
            tta=tta,
            use_gate=use_gate,
            engine=engine,
            device=device,
            precision=precision,
            modality=modality,
        )
        _check_same_model(finished, named, predictor, table)
        if writer and not finished:
            writer.create()
        predict = partial(predictor.predict_named, batch_size=batch_size, workers=workers)
        rows = map_in_processes(predict, named[len(finished) :])
        written = _write_rows(rows, writer, batch_size)
    return Predictions(finished + written, predictor)


def _open_table(table: Path | None, resume: bool) -> tuple[CsvTable | None, list[Row]]:
    """Return the writer of `table`, and the rows that the file contains already."""
    if table is None:
        if resume:
            raise UsageError('--resume needs --out, the table to resume.')
        return None, []
    if not table.parent.is_dir():
        raise UsageError(f'{table}: the folder {table.parent} does not exist. Create it, or choose another --out.')
    writer = open_table(table, COLUMNS)
    if not table.exists():
        return writer, []
    if not resume:
        raise UsageError(f'{table} exists already and was not changed. Choose another --out, or give --resume.')
    try:
        return writer, writer.read()
    except (CXRError, ValueError, KeyError, OSError) as error:
        raise UsageError(f'--resume: {table} is not a table of predictions ({error}). Choose another --out.') from None


def _check_same_images(finished: list[Row], names: list[str], table: Path | None) -> None:
    expected = [_path_text(name) for name in names[: len(finished)]]
    if [row['path'] for row in finished] != expected:
        raise UsageError(f'--resume: {table} contains other images. Name the same images as before, in the same order.')


def _check_same_model(
    finished: list[Row], named: Sequence[tuple[str, ImageLike]], predictor: Predictor, table: Path | None
) -> None:
    """Raise `UsageError` unless the `finished` rows have the threshold of `predictor`, and one of its probabilities.

    The image with the least certain probability is predicted again, because on it two networks differ most, and the
    first image that was rejected.
    """
    if not finished:
        return
    threshold = _number(finished[0], 'threshold', table)
    if threshold != predictor.threshold:
        raise UsageError(
            f'--resume: {table} has the threshold {threshold:g}, but now it is {predictor.threshold:g}. {SAME_OPTIONS}'
        )
    rejected = [index for index, row in enumerate(finished) if row['status'] == 'rejected'][:1]
    for row in predictor.predict_named([named[index] for index in rejected]):
        if row['status'] != 'rejected':
            raise UsageError(f'--resume: {table} rejects {row["path"]}, which is accepted now. {SAME_OPTIONS}')
    known = {index: _number(row, 'p_pneumonia', table) for index, row in enumerate(finished) if row['status'] == 'ok'}
    if not known:
        return
    index = min(known, key=lambda index: abs(known[index] - 0.5))
    (row,) = predictor.predict_named([named[index]])
    p = row['p_pneumonia']
    if p is None or abs(p - known[index]) > MAX_DIFFERENCE:
        now = row['message'] if p is None else f'{p:.4f}'
        raise UsageError(
            f'--resume: {table} has {known[index]:.4f} for {row["path"]}, but now it is {now}. {SAME_OPTIONS}'
        )


def _number(row: Row, name: str, table: Path | None) -> float:
    """Return the number in the column `name` of a row that was read from `table`."""
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise UsageError(
            f'--resume: {table} has {row[name]!r:.80} as {name}, which is not a number. Choose another --out.'
        ) from None


def _write_rows(rows: Iterator[Row], writer: CsvTable | None, batch_size: int) -> list[Row]:
    written: list[Row] = []
    try:
        while batch := list(islice(rows, batch_size)):
            batch = [row | {'path': _path_text(row['path'])} for row in batch]
            if writer:
                writer.append(batch)
            written += batch
    finally:
        if writer:
            writer.close()
    return written


def with_numbers(row: Row) -> Row:
    """Return a row with numbers as such and None for what is empty; in the rows of a resumed CSV file they are text."""
    numbers = {name: float(row[name]) for name in NUMBERS if row[name] is not None}
    texts = {name: None for name, value in row.items() if value == ''}
    return row | texts | numbers


def _path_text(path: str) -> str:
    """Return a path as valid UTF-8; bytes of a file name that are not valid become escape sequences."""
    return path.encode('utf-8', 'backslashreplace').decode()


class CsvTable:
    """A CSV file. A text that a spreadsheet would evaluate as a formula is written with a `'` in front.

    Interrupted at any time, the file contains complete rows.
    """

    footer = b''
    """The bytes after the last row."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = columns

    def create(self) -> None:
        """Write a file without rows. Raises `OutputError`."""
        with atomic(self.path) as temporary:
            temporary.write_bytes(_csv_bytes([self.columns]))

    def append(self, rows: Sequence[Row]) -> None:
        """Add `rows` at the end. Raises `OutputError`; the file then contains the rows before."""
        self.append_bytes(self.encode(rows))

    def encode(self, rows: Sequence[Row]) -> bytes:
        """Return `rows` as they are written to the file."""
        return _csv_bytes([_cell(row[name]) for name in self.columns] for row in rows)

    def read(self) -> list[Row]:
        """Return the rows of the file. Empty cells are None, all others are text.

        Raises `ValueError` if it is not a table with these columns.
        """
        try:
            lines = list(csv.reader(StringIO(read_text(self.path, MAX_BYTES), newline='')))
        except csv.Error as error:
            raise ValueError(str(error)) from None
        if not lines:
            raise ValueError('it is empty')
        _check_columns(lines[:1], self.columns)
        return [dict(zip(self.columns, map(_parse_cell, line), strict=True)) for line in lines[1:]]

    def close(self) -> None:
        """Write the rows that are not written yet. Raises `OutputError`."""

    def append_bytes(self, data: bytes, separator: bytes = b'') -> None:
        """Write `data` in front of the footer, after a `separator` unless it is the first row.

        If the disk becomes full, the file is restored. Raises `OutputError`.
        """
        with writing(self.path):
            end_of_rows = self.path.stat().st_size - len(self.footer)
        if end_of_rows > 1:
            data = separator + data
        try:
            with writing(self.path), open(self.path, 'rb+') as file:
                file.seek(end_of_rows)
                file.write(data + self.footer)
        except OutputError:
            with suppress(OSError):
                os.truncate(self.path, end_of_rows)
                with open(self.path, 'ab') as file:
                    file.write(self.footer)
            raise


class JsonTable(CsvTable):
    """A JSON file: an array with an object for each row."""

    footer = b'\n]\n'

    def create(self) -> None:
        """Write an empty array. Raises `OutputError`."""
        with atomic(self.path) as temporary:
            temporary.write_bytes(b'[' + self.footer)

    def append(self, rows: Sequence[Row]) -> None:
        """Add `rows` at the end. Raises `OutputError`; the file then contains the rows before."""
        if rows:
            lines = ',\n'.join(json.dumps(row, allow_nan=False) for row in rows)
            self.append_bytes(f'\n{lines}'.encode(), separator=b',')

    def read(self) -> list[Row]:
        """Return the rows of the file. Raises `ValueError` if it is not a table with these columns."""
        rows = read_json(self.path, MAX_BYTES)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError('not an array of objects')
        _check_columns(rows, self.columns)
        return rows


class ParquetTable(CsvTable):
    """A Parquet file. It cannot be extended, so it is rewritten after every `ROWS_PER_WRITE` rows and at the end."""

    ROWS_PER_WRITE = 2000

    def create(self) -> None:
        """Write a file without rows. Raises `OutputError`."""
        self.rows: list[Row] = []
        self.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Add `rows` at the end. Raises `OutputError`; the file then contains the rows that were written before."""
        self.rows += rows
        if len(self.rows) - self.written_rows >= self.ROWS_PER_WRITE:
            self.close()

    def read(self) -> list[Row]:
        """Return the rows of the file. Raises `ValueError` if it is not a table with these columns."""
        import pandas as pd

        table = pd.read_parquet(self.path).astype(object)
        _check_columns([table], self.columns)
        self.rows = table.where(table.notna(), None).to_dict('records')
        self.written_rows = len(self.rows)
        return list(self.rows)

    def close(self) -> None:
        """Write all rows. Raises `OutputError`."""
        import pandas as pd

        dtypes = {name: 'float64' if name in NUMBERS else 'string' for name in self.columns}
        table = pd.DataFrame(self.rows, columns=list(self.columns)).astype(dtypes)
        with atomic(self.path) as temporary:
            table.to_parquet(temporary, index=False)
        self.written_rows = len(self.rows)


TABLES: dict[str, type[CsvTable]] = {'.csv': CsvTable, '.json': JsonTable, '.parquet': ParquetTable}
"""Suffix of a file name -> the class that writes it."""


def open_table(path: Path, columns: Sequence[str]) -> CsvTable:
    """Return the writer of the file `path`, which is chosen by its suffix.

    Raises `UsageError` for another suffix than those in `TABLES`, or if a package is missing.
    """
    kind = TABLES.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f'--out {path}: unknown kind of table. The name must end in {", ".join(TABLES)}.')
    if kind is ParquetTable:
        require_package('pyarrow', f'--out {path}', 'parquet')
    return kind(path, columns)


def _csv_bytes(rows: Iterable[Sequence[Any]]) -> bytes:
    """Return `rows` as CSV with the line ending `\\n`.

    They are written with `\\r\\n` first: otherwise some versions of `csv` do not quote a cell with a carriage return.
    """
    lines: list[str] = []
    csv.writer(SimpleNamespace(write=lines.append), lineterminator='\r\n').writerows(rows)
    return ''.join(line.removesuffix('\r\n') + '\n' for line in lines).encode('utf-8', 'backslashreplace')


def _cell(value: Any) -> Any:
    if value is None:
        return ''
    return escape_formula(value) if isinstance(value, str) else value


def _parse_cell(cell: str) -> str | None:
    """Return the text that `_cell` wrote as `cell`."""
    return unescape_formula(cell) or None


def _check_columns(rows: Iterable[Iterable[str]], columns: Sequence[str]) -> None:
    """Raise `ValueError` unless each of `rows` has the `columns`."""
    for row in rows:
        if list(row) != list(columns):
            raise ValueError('other columns')
