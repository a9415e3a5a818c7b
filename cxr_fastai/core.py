"""The vocabulary that every module shares: classes, errors, the `Recipe` of a training and the `Run` folder.

    CXRError             exit 1  an expected failure: the value, why it is refused, what to do
    ├── FilmError        exit 1  one film cannot be read; has a stable `code` such as E_TRUNCATED
    ├── UsageError       exit 2  what was asked for does not fit together; nothing was written
    └── OutputError      exit 6  the disk refuses, or training produced no finite number
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

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
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path` to write; then sync it and rename it over `path`.

    A reader, or a crash, meets the old file or the new one and never half of one. Raises `OutputError`.
    """
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield temporary
        with open(temporary, 'rb+') as file: os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f'{path}: cannot be written ({error.strerror}). Free the disk or choose another place with '
                          '--out; a file that was there before is whole.') from error
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


@dataclass(frozen=True)
class Run:
    """The run folder, the interface between commands: `train` makes it, the others read and extend it."""
    path: Path

    @classmethod
    def create(cls, path: Path) -> Run:
        """Make the folder `path`. Raises `UsageError` where something is there already, `OutputError` where it
        cannot be made."""
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UsageError(f'{path} exists already and nothing in it was overwritten: choose another --out, or '
                             'delete it.')
        try: (path/'figures').mkdir(parents=True)
        except OSError as error:
            raise OutputError(f'{path}: the folder cannot be made ({error.strerror}): choose another --out.') from error
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
        return Recipe.from_dict(json.loads((self/'recipe.json').read_text(encoding='utf-8')))

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
        return json.loads((self/'metrics.json').read_text(encoding='utf-8'))

    def start(self, recipe: Recipe, items: pd.DataFrame) -> None:
        """Write down what is about to be trained."""
        write_json(self/'recipe.json', asdict(recipe))
        write_csv(self/'items.csv', items)

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to `journal.jsonl`: when, what, and `facts`, which hold no NaN."""
        line = json.dumps({'time': datetime.now(UTC).isoformat(timespec='seconds'), 'event': event, **facts},
                          allow_nan=False)
        with open(self/'journal.jsonl', 'a', encoding='utf-8') as file: file.write(line + '\n')

    def noted(self, event: str) -> dict[str, Any]:
        """The newest line of `journal.jsonl` about `event`; empty where there is none."""
        with suppress(FileNotFoundError):
            lines = map(json.loads, (self/'journal.jsonl').read_text(encoding='utf-8').splitlines())
            return ([line for line in lines if line['event'] == event] or [{}])[-1]
        return {}


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd
    try: return pd.read_csv(path)
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist yet: run `cxr-fastai evaluate {path.parent}` first.') from None
