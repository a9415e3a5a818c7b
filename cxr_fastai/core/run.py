"""The run folder, the interface between commands: `train` makes it, the others read and extend it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import check_new, write_csv, write_json, writing
from cxr_fastai.core.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A run folder, and what is in it."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> Run:
        """Make the folder `path`. Raises `UsageError` where something is there, `OutputError` where it cannot be."""
        check_new(path)
        if is_main_process():
            with writing(path):
                (path / 'figures').mkdir(parents=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in the folder `path`. Raises `UsageError` where there is none."""
        if not (path / 'recipe.json').is_file():
            raise UsageError(
                f'{path} is not a run folder (no recipe.json in it): `cxr-fastai train --out {path}` makes one.'
            )
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def recipe(self) -> Recipe:
        """The recipe it was trained with."""
        try:
            return Recipe.from_dict(read_json(self / 'recipe.json'))
        except (TypeError, KeyError) as error:
            raise UsageError(f'{self / "recipe.json"}: not a recipe of this version ({error}): train again.') from None

    @property
    def items(self) -> pd.DataFrame:
        """The images it was trained with: the items table."""
        return _read_csv(self / 'items.csv')

    @property
    def unreadable(self) -> list[str]:
        """The paths of images that its training skipped, since they could not be read."""
        return self.noted('start', 'resume').get('unreadable', [])

    @property
    def used_items(self) -> pd.DataFrame:
        """Its items without those that are `unreadable`."""
        return self.items[lambda items: ~items.path.isin(self.unreadable)]

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch."""
        return _read_csv(self / 'history.csv')

    @property
    def predictions(self) -> pd.DataFrame:
        """One row an image, for each split evaluated so far."""
        return _read_csv(self / 'predictions.csv')

    def predicted(self, split: str) -> pd.DataFrame:
        """The predictions of one `split`."""
        return self.predictions[lambda table: table.split == split].reset_index(drop=True)

    @property
    def decision(self) -> dict[str, Any]:
        """How a probability becomes a decision, as `evaluate` chose it; empty where it has not."""
        return read_json(self / 'decision.json') if (self / 'decision.json').exists() else {}

    @property
    def robustness(self) -> pd.DataFrame:
        """One row a corruption and strength, for each split evaluated so."""
        return _read_csv(self / 'robustness.csv')

    @property
    def metrics(self) -> dict[str, Any]:
        """One object a split evaluated so far."""
        return read_json(self / 'metrics.json') if (self / 'metrics.json').exists() else {}

    def start(self, recipe: Recipe, items: pd.DataFrame) -> None:
        """Write down what is about to be trained."""
        write_csv(self / 'items.csv', items)
        write_json(self / 'recipe.json', asdict(recipe))  # last: with it the folder is a run

    def write_split(self, name: str, table: pd.DataFrame, split: str) -> None:
        """Write the rows of one `split` into the CSV `name`; those of other splits in it are kept."""
        import pandas as pd

        if (self / name).exists():
            old = _read_csv(self / name)
            table = pd.concat([old[old.split != split], table], ignore_index=True)
        write_csv(self / name, table)

    def sweep(self) -> None:
        """Remove what a training that was killed left half written."""
        for name in TRAINED if is_main_process() else ():
            for left in self.path.glob(f'.{name}.*.tmp'):
                left.unlink(missing_ok=True)

    def note(self, event: str, **facts: Any) -> None:
        """Append a line to `journal.jsonl`: when, what, and `facts`, which hold no NaN."""
        if not is_main_process():
            return
        line = json.dumps(
            {'time': datetime.now(UTC).isoformat(timespec='seconds'), 'event': event, **facts}, allow_nan=False
        )
        with writing(self / 'journal.jsonl'), open(self / 'journal.jsonl', 'ab+') as file:
            torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b'\n'  # by a crash
            file.write(b'\n' * bool(torn) + line.encode() + b'\n')

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into this folder. Raises `UsageError` where one does."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self / '.lock', timeout=0) if is_main_process() else nullcontext():
                yield
        except Timeout:
            raise UsageError(f'{self.path}: another process trains there: wait for it to end, or stop it.') from None

    @property
    def images(self) -> Path | None:
        """Where its images were when it was last trained; None where that is not known."""
        data = self.noted('start', 'resume').get('data')
        return Path(data) if data else None

    def noted(self, *events: str) -> dict[str, Any]:
        """The newest line of `journal.jsonl` about any of `events`; empty where there is none."""
        newest, journal = {}, self / 'journal.jsonl'
        for text in journal.read_text(encoding='utf-8').splitlines() if journal.is_file() else ():
            with suppress(ValueError):  # a crash may have torn the last line
                line = json.loads(text)
                if line['event'] in events:
                    newest = line
        return newest


TEXT = ('path', 'label', 'split', 'patient', 'kind', 'prediction', 'phase')
"""Columns that stay as they are written: a patient `007` is no number, and one called `NA` is not missing."""
EXACT = ('p_pneumonia',)
"""Columns of which every digit counts: a score may lie next to the threshold, and older pandas round the last one."""
TRAINED = ('recipe.json', 'items.csv', 'history.csv', 'state.pt', 'failure.json', 'model.safetensors', 'learner.pkl')
WRITER = {
    'items.csv': 'train',
    'history.csv': 'train',
    'predictions.csv': 'evaluate',
    'robustness.csv': 'evaluate --robustness',
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file `path`. Raises `UsageError` where it is damaged."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path}: damaged ({error}).') from None


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        names = pd.read_csv(path, nrows=0).columns
        return pd.read_csv(
            path,
            dtype={name: str for name in names if name in TEXT},
            keep_default_na=False,
            na_values={name: [''] for name in names if name not in (*TEXT, *EXACT)},
            converters={name: float for name in names if name in EXACT},
        )
    except FileNotFoundError:
        raise UsageError(f'{path} is missing: `cxr-fastai {WRITER[path.name]}` writes it.') from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path}: damaged ({error}).') from None
