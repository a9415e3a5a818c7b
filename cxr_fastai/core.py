"""The vocabulary that every module shares: classes, errors, the `Recipe` of a training and the `Run` folder.

    CXRError             exit 1  an expected failure: the value, why it is refused, what to do
    ├── FilmError        exit 1  one film cannot be read; has a stable `code` such as E_TRUNCATED
    ├── UsageError       exit 2  what was asked for does not fit together; nothing was written
    └── OutputError      exit 6  the disk refuses, or training produced no finite number
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

T = TypeVar('T')
VOCAB = ('NORMAL', 'PNEUMONIA')
"""The classes in the order of the network's outputs; the last one is the positive class."""
POSITIVE = VOCAB.index('PNEUMONIA')


class CXRError(Exception):
    """An expected failure, told in one line."""
    exit_code = 1


class FilmError(CXRError):
    """A film that cannot be read; `code` is a stable name, the message names the file."""

    def __init__(self, message: str, code: str = 'E_IO'):
        super().__init__(message)
        self.code = code

    def __reduce__(self): return type(self), (str(self), self.code)


class UsageError(CXRError):
    """What was asked for does not fit together."""
    exit_code = 2


class OutputError(CXRError):
    """The disk refuses, or training produced no finite number."""
    exit_code = 6


class CXRWarning(UserWarning):
    """Something the user should know before believing a figure."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `epochs` at the learning rate `lr`, with the body frozen or not."""
    name: str
    epochs: int
    lr: float
    frozen: bool = False


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training; `recipe.json` in the run folder is this, field by field.

    `models.make_recipe` fills in the phases of an architecture. Lengths are pixels, angles degrees, `translate` a
    share of the side, `flip` a probability; `brightness` and `contrast` b mean factors drawn from [1-b, 1+b];
    `interpolation` (`nearest` or `bilinear`) is that of rotation and translation.
    """
    arch: str
    phases: tuple[Phase, ...]
    name: str = 'reference'
    weights: str = 'none'
    valid: str = 'official'
    size: int = 224
    batch_size: int = 32
    workers: int = 0
    limit: int | None = None
    seed: int = 42
    weight_decay: float = 1e-4
    plateau_factor: float = 0.1
    plateau_patience: int = 2
    flip: float = 0.5
    degrees: float = 10.0
    translate: float = 0.1
    brightness: float = 0.2
    contrast: float = 0.2
    interpolation: str = 'nearest'
    threshold: float = 0.5

    @property
    def epochs(self) -> int:
        """The total over the phases."""
        return sum(phase.epochs for phase in self.phases)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**fields, 'phases': tuple(Phase(**phase) for phase in fields['phases'])})


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk says against writing `path` into an `OutputError`."""
    try: yield
    except OSError as error:
        raise OutputError(f'{path}: cannot be written ({error.strerror}). Free the disk or choose another place with '
                          '--out; a file that was there before is whole.') from error


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` to write; then sync it and rename it over `path`.

    A reader, or a crash, meets the old file or the new one and never half of one. Raises `OutputError`.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with writing(path):
            yield temporary
            with open(temporary, 'rb+') as file: os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError): temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary: temporary.write_text(text, encoding='utf-8', errors='backslashreplace')


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` to `path` atomically, without its index."""
    write_text(path, table.to_csv(index=False, lineterminator='\n'))


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically; a NaN is an error, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + '\n')


def progress(steps: Sequence[T], console: Console | None) -> Iterable[T]:
    """`steps`, with a bar that vanishes at the end on a `console` that is a terminal; silent elsewhere."""
    from rich.progress import track
    return track(steps, 'films', console=console, transient=True, disable=not (console and console.is_terminal))


def check_new(folder: Path) -> None:
    """Raise `UsageError` unless `folder` is still to be made, or is an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f'{folder} exists already and nothing in it was overwritten: choose another --out, or delete '
                         'it.')


@dataclass(frozen=True)
class Run:
    """The run folder, the interface between commands: `train` makes it, the others read and extend it."""
    path: Path

    @classmethod
    def create(cls, path: Path) -> Run:
        """Make the folder `path`. Raises `UsageError` where something is there, `OutputError` where it cannot be."""
        check_new(path)
        with writing(path): (path/'figures').mkdir(parents=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in the folder `path`. Raises `UsageError` where there is none."""
        if not (path/'recipe.json').is_file():
            raise UsageError(f'{path} is not a run folder (no recipe.json in it): `cxr-fastai train --out {path}` '
                             'makes one.')
        return cls(path)

    def __truediv__(self, name: str) -> Path: return self.path/name

    @property
    def recipe(self) -> Recipe:
        """The recipe it was trained with."""
        try: return Recipe.from_dict(_read_json(self/'recipe.json'))
        except (TypeError, KeyError) as error:
            raise UsageError(f'{self/"recipe.json"}: not a recipe of this version ({error}): train again.') from None

    @property
    def items(self) -> pd.DataFrame:
        """The films it was trained with: the items table."""
        return _read_csv(self/'items.csv')

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        return _read_csv(self/'history.csv')

    @property
    def predictions(self) -> pd.DataFrame:
        """One row a film, for each split evaluated so far."""
        return _read_csv(self/'predictions.csv')

    @property
    def metrics(self) -> dict[str, Any]:
        """One object a split evaluated so far."""
        return _read_json(self/'metrics.json') if (self/'metrics.json').exists() else {}

    def start(self, recipe: Recipe, items: pd.DataFrame) -> None:
        """Write down what is about to be trained."""
        write_json(self/'recipe.json', asdict(recipe))
        write_csv(self/'items.csv', items)

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to `journal.jsonl`: when, what, and `facts`, which hold no NaN."""
        line = json.dumps({'time': datetime.now(UTC).isoformat(timespec='seconds'), 'event': event, **facts},
                          allow_nan=False)
        with writing(self/'journal.jsonl'), open(self/'journal.jsonl', 'a', encoding='utf-8') as file:
            file.write(line + '\n')

    def noted(self, event: str) -> dict[str, Any]:
        """The newest line of `journal.jsonl` about `event`; empty where there is none."""
        newest, journal = {}, self/'journal.jsonl'
        for text in journal.read_text(encoding='utf-8').splitlines() if journal.is_file() else ():
            with suppress(ValueError):  # a crash may have torn the last line
                line = json.loads(text)
                if line['event'] == event: newest = line
        return newest


TEXT = ('path', 'label', 'split', 'patient', 'kind', 'prediction', 'phase')
"""Columns that stay as they are written: a patient `007` is no number, and one called `NA` is not missing."""
WRITER = {'items.csv': 'train', 'history.csv': 'train', 'predictions.csv': 'evaluate'}


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd
    try:
        names = pd.read_csv(path, nrows=0).columns
        return pd.read_csv(path, dtype={name: str for name in names if name in TEXT}, keep_default_na=False,
                           na_values={name: [''] for name in names if name not in TEXT})
    except FileNotFoundError:
        raise UsageError(f'{path} is missing: `cxr-fastai {WRITER[path.name]}` writes it.') from None
    except ValueError as error: raise UsageError(f'{path}: damaged ({error}).') from None


def _read_json(path: Path) -> dict[str, Any]:
    try: return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error: raise UsageError(f'{path}: damaged ({error}).') from None
