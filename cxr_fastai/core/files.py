"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def writing(path: Path, by: str = '--out') -> Iterator[None]:
    """Turn what the disk says against writing `path`, which the user chooses `by` an option, into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f'{path}: cannot be written ({error.strerror}). Free the disk or choose another place by '
            f'{by}; a file that was there before is whole.'
        ) from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` to write; then sync it and rename it over `path`.

    A reader, or a crash, meets the old file or the new one and never half of one. Raises `OutputError`. Of several
    processes only the one that leads writes; what the others write goes nowhere.
    """
    if not is_main_process():
        yield Path(os.devnull)
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    with open(path, 'rb+') as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` atomically, without its index."""
    write_text(path, csv_text(table))


def csv_text(table: pd.DataFrame) -> str:
    """`table` as CSV, without its index."""
    return table.to_csv(index=False, lineterminator='\n')


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically; a NaN is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def check_new(folder: Path) -> None:
    """Raise `UsageError` unless `folder` is still to be made, or is an empty folder. (A process that does not write
    does not ask.)"""
    if is_main_process() and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(
            f'{folder} exists already and nothing in it was overwritten: choose another --out, or delete it.'
        )
