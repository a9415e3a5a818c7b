"""The vocabulary that every module shares: classes, errors, and whole or no files.

    CXRError             exit 1  an expected failure: the value, why it is refused, what to do
    ├── FilmError        exit 1  one film cannot be read; has a stable `code` such as E_TRUNCATED
    ├── UsageError       exit 2  what was asked for does not fit together; nothing was written
    ├── OutputError      exit 6  the disk refuses, or training produced no finite number
    └── Stopped          exit 130 or 143: a signal ended a training that can go on
"""
from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from rich.console import Console

S, T = TypeVar('S'), TypeVar('T')
VOCAB = ('NORMAL', 'PNEUMONIA')
"""The classes in the order of the network's outputs; the last one is the positive class."""
POSITIVE = VOCAB.index('PNEUMONIA')
UNDER_WAY = 64
"""Films read in threads that nobody has asked for yet."""
SILENCE = 30
"""Seconds between two lines of progress where there is no terminal."""


class CXRError(Exception):
    """An expected failure, told in one line."""
    exit_code = 1


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an error's message, or at most so many letters of it; its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


REJECTED = ('E_TOO_SMALL', 'E_TOO_LARGE', 'E_BLANK', 'E_MULTIFRAME', 'E_DICOM_MODALITY')
"""Codes of files that may be whole, but are no film to judge."""


class FilmError(CXRError):
    """A film that cannot be used; `code` is a stable name, the message names the file."""

    def __init__(self, message: str, code: str = 'E_IO'):
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> str:
        """`rejected` where the file may be whole but is no film to judge, `error` where it cannot be read."""
        return 'rejected' if self.code in REJECTED else 'error'

    def __reduce__(self): return type(self), (str(self), self.code)

    def of(self, path: str | Path) -> FilmError:
        """The same error with the name of the film `path` and the code before its message."""
        return FilmError(f'{path}: {self.code}: {self}'.replace('\n', ' '), self.code)


class UsageError(CXRError):
    """What was asked for does not fit together."""
    exit_code = 2


class OutputError(CXRError):
    """The disk refuses, or training produced no finite number."""
    exit_code = 6


class Stopped(CXRError):
    """The signal `number` ended a training that can go on."""

    def __init__(self, number: int, message: str = 'stopped'):
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class CXRWarning(UserWarning):
    """Something the user should know before believing a figure."""


@dataclass(frozen=True)
class Film:
    """A decoded film: grey `pixels` uint8 (h, w), and what the file was: its `format`, the `mode` its pixels are stored
    in (Pillow's name, or DICOM's), `bits` a sample, `width` and `height` as stored.

    `notes` tell what was done beyond decoding, such as the window of a deep film; `burned_in` is true where the file
    says that text in the picture may name the patient.
    """
    pixels: np.ndarray
    format: str
    mode: str
    bits: int
    width: int
    height: int
    notes: tuple[str, ...] = ()
    burned_in: bool = False


def leads() -> bool:
    """True in the process that writes and speaks: the only one, or the first of several that `accelerate launch` or
    `torchrun` started."""
    return int(os.environ.get('WORLD_SIZE', 1)) < 2 or int(os.environ.get('RANK', 0)) == 0


@contextmanager
def writing(path: Path, by: str = '--out') -> Iterator[None]:
    """Turn what the disk says against writing `path`, which the user chooses `by` an option, into an `OutputError`."""
    try: yield
    except OSError as error:
        raise OutputError(f'{path}: cannot be written ({error.strerror}). Free the disk or choose another place by '
                          f'{by}; a file that was there before is whole.') from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` to write; then sync it and rename it over `path`.

    A reader, or a crash, meets the old file or the new one and never half of one. Raises `OutputError`. Of several
    processes only the one that leads writes; what the others write goes nowhere.
    """
    if not leads():
        yield Path(os.devnull)
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with writing(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError): temporary.unlink()


def sync(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    with open(path, 'rb+') as file: os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary: temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` atomically, without its index."""
    write_text(path, csv_text(table))


def csv_text(table: pd.DataFrame) -> str:
    """`table` as CSV, without its index."""
    return table.to_csv(index=False, lineterminator='\n')


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically; a NaN is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def progress(steps: Iterable[T], console: Console | None, total: int | None = None) -> Iterator[T]:
    """`steps`, one a film and `total` in all (default: their length), with a bar that vanishes at the end on a
    `console` that is a terminal, and a line every half minute on another."""
    total = len(steps) if total is None else total
    if console and console.is_terminal: yield from _with_bar(steps, console, total)
    else: yield from _with_lines(steps, console, total)


def in_threads(func: Callable[[S], T], films: Sequence[S], workers: int | None = None,
               console: Console | None = None) -> Iterator[T]:
    """`func` of each of the `films`, in their order, from `workers` threads (default: the cores), with `progress`.

    Only some are under way at a time, so that results which nobody has taken yet do not fill the memory.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from progress(_ahead(pool, func, films), console, len(films))


def _ahead(pool: ThreadPoolExecutor, func: Callable[[S], T], films: Iterable[S]) -> Iterator[T]:
    waiting: deque[Future[T]] = deque()
    for film in films:
        waiting.append(pool.submit(func, film))
        if len(waiting) == UNDER_WAY: yield waiting.popleft().result()
    while waiting: yield waiting.popleft().result()


def _with_bar(steps: Iterable[T], console: Console, total: int) -> Iterator[T]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text: return Text(f'{task.speed:,.0f}/s' if task.speed else '')
    columns = ('films', BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield from bar.track(steps, total)


def _with_lines(steps: Iterable[T], console: Console | None, total: int) -> Iterator[T]:
    told = time.monotonic()
    for done, step in enumerate(steps, 1):
        yield step
        if console and time.monotonic() - told > SILENCE:
            told = time.monotonic()
            console.print(f'{done:,} of {total:,} films', highlight=False)


def visible(text: str) -> str:
    """`text` with escapes for what commands a terminal, turns the direction of writing, breaks a line, or is a byte of
    a file's name that is no text."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def check_new(folder: Path) -> None:
    """Raise `UsageError` unless `folder` is still to be made, or is an empty folder. (A process that does not write
    does not ask.)"""
    if leads() and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f'{folder} exists already and nothing in it was overwritten: choose another --out, or delete '
                         'it.')
