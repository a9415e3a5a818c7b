"""Functions that write a file completely or not at all, so that a crash never leaves half a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    import pandas as pd


StrPath = str | os.PathLike[str]
"""A path as a text, or any object that stands for one."""
SOFTWARE = 'cxr_fastai'
"""The text `Software` in the PNG files of maps, masks and figures, by which they are not taken for X-ray images."""
FORMULA_STARTS = ('=', '+', '-', '@', '\t', '\r', '\0')
"""First characters that make a spreadsheet evaluate a text as a formula."""


@contextmanager
def writing(path: Path, option: str = '--out') -> Iterator[None]:
    """Convert an `OSError` raised in the block into an `OutputError` about `path`.

    `option` is the option or environment variable by which the user chooses the path; the message names it.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f'{path}: cannot be written ({error.strerror}). Free disk space, or choose another place with {option}. '
            'An existing file was not changed.'
        ) from error


@contextmanager
def atomic(path: Path, option: str = '--out') -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block ends, flush that file to disk and rename it to `path`.

    Readers, also after a crash, see the old file or the new file and never a part of it. If the block raises, the old
    file stays. In a distributed run only the main process writes; the others get the null device. Raises `OutputError`;
    `option` is that of `writing`.
    """
    if not is_main_process():
        yield Path(os.devnull)
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with writing(path, option):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until the contents of the file `path` are on the disk."""
    with open(path, 'rb+') as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8. Raises `OutputError`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` atomically, without its index. Raises `OutputError`."""
    write_text(path, csv_text(table))


def csv_text(table: pd.DataFrame) -> str:
    """Return `table` as CSV text, without its index. Texts pass `escape_formula`."""
    return table.map(_escape_cell).to_csv(index=False, lineterminator='\n')


def _escape_cell(value: Any) -> Any:
    return escape_formula(value) if isinstance(value, str) else value


def escape_formula(text: str) -> str:
    """Return `text` with a `'` in front if a spreadsheet would evaluate it as a formula. `unescape_formula` undoes it.

    See CWE-1236. A text that only looks escaped gets another `'`, so that every text can be restored.
    """
    return f"'{text}" if _is_formula(text) else text


def unescape_formula(text: str) -> str:
    """Return the text for which `escape_formula` returned `text`."""
    is_escaped = text.startswith("'") and _is_formula(text)
    return text[1:] if is_escaped else text


def _is_formula(text: str) -> bool:
    """Return True if `text` is a formula, or a formula after one or more `'`."""
    return text.lstrip("'").startswith(FORMULA_STARTS)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically, as JSON. Raises `OutputError`, and `ValueError` for NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def check_new(folder: Path) -> None:
    """Raise `UsageError` if `folder` is a file or a folder with files, and `OutputError` if it cannot be written.

    Does nothing outside the main process.
    """
    if not is_main_process():
        return
    is_empty_folder = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty_folder:
        raise UsageError(
            f'{folder} exists already and nothing in it was overwritten. Choose another --out, or delete it.'
        )
    check_writable(folder)


def check_writable(folder: Path, option: str = '--out') -> None:
    """Raise `OutputError` if no file can be created in `folder` or, if it does not exist, in the folder to make it in.

    Commands that work for long call it first. `option` is that of `writing`. Does nothing outside the main process.
    """
    if is_main_process():
        with writing(folder, option), tempfile.TemporaryFile(dir=nearest_folder(folder)):
            pass


def nearest_folder(path: Path) -> Path:
    """Return `path` if it exists, else the nearest folder above it that does."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
