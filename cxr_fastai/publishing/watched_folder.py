"""Prediction of the images that arrive in a folder, into a table, and into DICOM reports for an archive."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cxr_fastai.core.errors import CXRError, ImageError, UsageError
from cxr_fastai.core.files import StrPath, sync, writing
from cxr_fastai.data.watching import ArrivedFile, FolderWatch, Journal, JournaledRows, check_watched, locked
from cxr_fastai.images.decode import LoadedFile
from cxr_fastai.inference.predictor import COLUMNS, Predictor, Row
from cxr_fastai.inference.tables import CsvTable, Predictions
from cxr_fastai.publishing.dicom_output import DicomFolder, check_dicom_folder
from cxr_fastai.publishing.dicom_reports import Algorithm

JOURNAL_SUFFIX = '.journal.jsonl'
MAX_BATCH_BYTES = 2**28
"""Largest size of the files that are in memory at once, unless a single one is larger."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """Where the results of a watched folder go: rows to the CSV file `table`, reports to the folder `dicom`, or both.

    With `explain`, maps go to `dicom` too. Raises `UsageError` if they do not fit together.
    """

    table: Path | None = None
    dicom: Path | None = None
    explain: bool = False

    def __post_init__(self) -> None:
        if self.table is None and self.dicom is None:
            raise UsageError('--watch needs --dicom-out DIR or --out FILE.csv, where the results go.')
        if self.explain and self.dicom is None:
            raise UsageError('--watch --explain needs --dicom-out DIR, where the maps go.')
        if self.table and self.table.suffix.lower() != '.csv':
            raise UsageError(
                f'--watch --out {self.table}: rows are added to CSV files only. Name one that ends in .csv.'
            )

    @property
    def journal(self) -> Path:
        """The journal of what was handled: next to the DICOM folder, or else next to the table."""
        path = (self.dicom or self.table or Path()).absolute()
        return path.with_name(path.name + JOURNAL_SUFFIX)

    def check(self, folder: StrPath) -> None:
        """Raise `UsageError` or `OutputError` if the results of images in `folder` cannot be written there."""
        folder = Path(folder)
        check_watched(folder)
        if self.dicom:
            if self.dicom.resolve().is_relative_to(folder.resolve()):
                raise UsageError(
                    f'--dicom-out {self.dicom} is in the watched folder {folder}, so reports would be taken for images.'
                    ' Choose a folder elsewhere.'
                )
            check_dicom_folder(self.dicom)
        if self.table and not self.table.parent.is_dir():
            raise UsageError(f'{self.table}: the folder {self.table.parent} does not exist. Create it first.')
        if self.table and self.table.exists() and not self.journal.exists():
            raise UsageError(
                f'{self.table} exists already, and there is no journal {self.journal} of it, so it was not changed. '
                'Choose another --out.'
            )


@dataclass(frozen=True)
class WatchedBatch:
    """What was done with some of the images: their predictions, and the DICOM files, if any."""

    predictions: Predictions
    dicom: DicomFolder | None


def watch_folder(
    predictor: Predictor,
    identity: str,
    folder: StrPath,
    outputs: Outputs,
    interval: float = 5.0,
    batch_size: int = 32,
    workers: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[WatchedBatch]:
    """Predict each image that arrives in `folder` once, and yield the batches. Never ends by itself.

    `identity` is the SHA-256 of the model (see `identify_model`). A file is complete if it did not change for
    `interval` seconds. A journal next to the output remembers what was handled, so that the next call continues. After
    a crash it also completes the table, so that each file has one row. A file that is replaced while it is read is
    handled when it is complete again. `clock` and `sleep` are those of `FolderWatch`. Raises `UsageError` for outputs
    that do not fit the folder or the journal, or if another process uses the journal, and `OutputError`.
    """
    folder = Path(folder)
    outputs.check(folder)
    algorithm = Algorithm.of(predictor, identity)
    with locked(outputs.journal):
        journal = Journal(outputs.journal, _settings(outputs, algorithm, predictor.config.modality))
        table = _WatchedTable(outputs.table, journal.last_rows) if outputs.table else None
        log.info('watching %s (stop with Ctrl-C); %d files are in the journal %s', folder, len(journal), journal.path)
        watch = FolderWatch(folder, journal.__contains__, interval, clock, sleep)
        for files in watch.arrivals():
            for batch in _batches(files, batch_size):
                images = _read(watch, batch)
                if not images:
                    continue
                handled = _handle(list(images.values()), predictor, algorithm, outputs, workers)
                rows = table.prepare(handled.predictions.rows) if table else None
                journal.add(list(images), rows)
                if table and rows:
                    table.append(rows)
                yield handled


def _settings(outputs: Outputs, algorithm: Algorithm, modality: str) -> dict[str, object]:
    """Return what must not change between two processes that use the same journal, as JSON values."""
    return {
        'model': algorithm.sha256,
        'parameters': algorithm.parameters,
        'modality': modality,
        'table': None if outputs.table is None else str(outputs.table.absolute()),
        'dicom': outputs.dicom is not None,
        'explain': outputs.explain,
    }


def _batches(files: Sequence[ArrivedFile], batch_size: int) -> Iterator[list[ArrivedFile]]:
    """Yield `files` in batches of up to `batch_size` files and, unless one file is larger, `MAX_BATCH_BYTES`."""
    batch: list[ArrivedFile] = []
    for file in files:
        size = sum(other.size for other in batch) + file.size
        if batch and (len(batch) == batch_size or size > MAX_BATCH_BYTES):
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def _read(watch: FolderWatch, files: Sequence[ArrivedFile]) -> dict[ArrivedFile, LoadedFile]:
    """Return the contents of those of the `files` that are still what was found."""
    contents = {file: watch.read(file) for file in files}
    return {file: image for file, image in contents.items() if image}


def _handle(
    images: Sequence[LoadedFile],
    predictor: Predictor,
    algorithm: Algorithm,
    outputs: Outputs,
    workers: int | None,
) -> WatchedBatch:
    rows = list(predictor.predict(images, len(images), workers))
    predictions = Predictions(rows, predictor)
    dicom = None
    if outputs.dicom:
        dicom = DicomFolder(outputs.dicom, algorithm)
        dicom.write_reports(images, rows)
        if outputs.explain:
            for _, explanation in dicom.explain(predictions, images):
                if isinstance(explanation, ImageError):
                    dicom.problems.append(explanation)
    return WatchedBatch(predictions, dicom)


class _WatchedTable:
    """The CSV file `path`. `last_rows`, the last ones in the journal, are completed if a crash has prevented that.

    Raises `UsageError` if the file is not a table of predictions, and `OutputError`.
    """

    def __init__(self, path: Path, last_rows: JournaledRows | None) -> None:
        self.path = path
        self.table = CsvTable(path, COLUMNS)
        if last_rows and path.is_file():
            self._complete(last_rows)
        if path.exists():
            self._check()

    def prepare(self, rows: Sequence[Row]) -> JournaledRows:
        """Return how `append` will write `rows`, into a new file if somebody has taken the old one away.

        Raises `OutputError`.
        """
        if not self.path.exists():
            self.table.create()
        with writing(self.path):
            offset = self.path.stat().st_size
        return JournaledRows(offset, self.table.encode(rows).decode())

    def append(self, rows: JournaledRows) -> None:
        """Add `rows`, and wait until they are on the disk, because the journal keeps only the last ones apart."""
        self.table.append_bytes(rows.text.encode())
        with writing(self.path):
            sync(self.path)

    def _complete(self, rows: JournaledRows) -> None:
        """Add what is missing of `rows`, unless the file is another one than before."""
        data = rows.text.encode()
        with writing(self.path), open(self.path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(rows.offset)
            written = file.read(len(data) + 1)
        if size >= rows.offset and data.startswith(written):
            self.table.append_bytes(data[len(written) :])

    def _check(self) -> None:
        try:
            self.table.read()
        except (CXRError, ValueError) as error:
            raise UsageError(f'{self.path} is not a table of predictions ({error}). Choose another --out.') from None
