"""The run folder, which is the interface between the commands: `train` creates it, the others read and extend it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from cxr_fastai.core.environment import is_main_process
from cxr_fastai.core.errors import CXRError, CXRWarning, UsageError
from cxr_fastai.core.files import StrPath, check_new, write_csv, write_json, writing
from cxr_fastai.core.folders import sweep
from cxr_fastai.core.foreign import parse_json, read_text
from cxr_fastai.core.paths import HUB_PREFIX, PRETRAINED
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.recipe_fields import parse_recipe
from cxr_fastai.core.run_files import (
    MISMATCHES,
    OUT_OF_FOLD,
    SHA256,
    hash_results,
    read_decision,
    read_json,
    read_metrics,
    read_table,
)
from cxr_fastai.core.schemas import Fields, Flag, Integer, ListOf, Text, check_object

if TYPE_CHECKING:
    import pandas as pd

TRAINING_FILES = (
    'recipe.json',
    'items.csv',
    'history.csv',
    'state.pt',
    'failure.json',
    'model.safetensors',
    'learner.pkl',
)
"""Files that `train` writes atomically."""
RESULT_FILES = ('predictions.csv', 'decision.json', 'metrics.json', 'robustness.csv', OUT_OF_FOLD, 'report.html') + (
    'model_card.md',
)
"""Files that `evaluate` and `report` write atomically."""

JOURNAL = {
    'event': Text(100),
    'data': Text(2**12, optional=True, required=False),
    'unreadable': ListOf(Text(2**12), required=False),
    'callbacks': ListOf(Text(200), required=False),
    'parameters': Integer(0, optional=True, required=False),
    'best': Fields({}, optional=True, required=False),
    'epochs': Integer(0, required=False),
    'how': Text(20, required=False),
    'tta': Flag(required=False),
    'members': ListOf(Fields({'model': Text(64, SHA256), 'recipe': Fields({})}), required=False),
}
"""The fields of a line of `journal.jsonl` that are read."""
MAX_JOURNAL = 2**28
"""Largest journal, in bytes."""


@dataclass(frozen=True)
class Run:
    """A run folder. Its properties read its files; they raise `UsageError` for missing or damaged files."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, 'path', Path(self.path))

    @classmethod
    def create(cls, path: StrPath) -> Run:
        """Create the folder `path`. Raises `UsageError` if it is not empty, `OutputError` if it cannot be written."""
        path = Path(path)
        check_new(path)
        if is_main_process():
            with writing(path):
                (path / 'figures').mkdir(parents=True)
        return cls(path)

    @classmethod
    def open(cls, path: StrPath) -> Run:
        """Return the run in the folder `path`. Raises `UsageError` if it is not a run folder."""
        path = Path(path)
        if not (path / 'recipe.json').exists():
            if (path / 'manifest.json').exists() or path.suffix.lower() == '.zip':
                raise UsageError(
                    f'{path} is not a run folder, but a bundle, which has no training to work on. Name the run that '
                    'it was exported from.'
                )
            raise UsageError(_describe_no_run(path))
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def recipe(self) -> Recipe:
        """The recipe of the training."""
        return read_recipe(self / 'recipe.json')

    @property
    def items(self) -> pd.DataFrame:
        """The items table of the training: one row per image."""
        return read_table(self / 'items.csv')

    @property
    def unreadable(self) -> list[str]:
        """The paths of the images that the training skipped, because they could not be read."""
        return self.last_event('start', 'resume').get('unreadable', [])

    @property
    def used_items(self) -> pd.DataFrame:
        """The items table without the images that are `unreadable`."""
        items = self.items
        return items[~items.path.isin(self.unreadable)]

    @property
    def images(self) -> Path | None:
        """The folder of the images when the run was last trained; None if it was not recorded."""
        folder = self.last_event('start', 'resume').get('data')
        return Path(folder) if folder else None

    @property
    def is_from_table(self) -> bool:
        """Whether the images come from a table in memory, so that only the run knows which of them are test images."""
        return bool(self.last_event('start', 'resume').get('from_table'))

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        return read_table(self / 'history.csv')

    @property
    def has_ended(self) -> bool:
        """Whether the training has ended, and was not continued since."""
        return self.last_event('start', 'resume', 'end').get('event') == 'end'

    @property
    def kept_epoch(self) -> int | None:
        """The epoch that the weights are from; None if it is not recorded, as for networks trained by hand."""
        epoch = (self.last_event('end').get('best') or {}).get('epoch')
        return epoch if isinstance(epoch, int) else None

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per image, for every split that was evaluated."""
        return read_table(self / 'predictions.csv')

    def predicted(self, split: str) -> pd.DataFrame:
        """Return the predictions of one `split`: one row per image."""
        predictions = self.predictions
        return predictions[predictions.split == split].reset_index(drop=True)

    @property
    def has_out_of_fold(self) -> bool:
        """Whether the run has out-of-fold predictions in the place of those for validation images of its own."""
        return (self / OUT_OF_FOLD).is_file()

    @property
    def out_of_fold(self) -> pd.DataFrame:
        """The predictions of other networks, trained in the same way, each for the images that it was not trained on.

        One row per image, as in `predictions`, and the column `fold`; with test-time views also `tta`, always True.
        They take the place of predictions for validation images in a run that was trained on all images.
        """
        return read_table(self / OUT_OF_FOLD)

    @property
    def decision(self) -> dict[str, Any]:
        """The threshold and the rule that chose it, as `evaluate` wrote them; empty before the first `evaluate`."""
        return read_decision(self / 'decision.json')

    @property
    def metrics(self) -> dict[str, Any]:
        """Split to its metrics, for every split that was evaluated.

        Raises `UsageError` if they are not those of `predictions.csv` and `decision.json`.
        """
        metrics = self.stored_metrics
        for split, values in metrics.items():
            self._refuse(split, self._find_mismatch(split, values))
        return metrics

    @property
    def stored_metrics(self) -> dict[str, Any]:
        """The contents of `metrics.json`: like `metrics`, but of whatever predictions and decision; perhaps empty."""
        return read_metrics(self / 'metrics.json')

    def intact_metrics(self, *parts: str) -> dict[str, Any]:
        """Return the metrics of the splits of which `parts` of `MISMATCHES` (default: all) fit; perhaps none."""
        intact = {}
        with suppress(UsageError):
            for split, values in self.stored_metrics.items():
                with suppress(UsageError):
                    if not self._find_mismatch(split, values, parts or tuple(MISMATCHES)):
                        intact[split] = values
        return intact

    def _find_mismatch(self, split: str, metrics: dict[str, Any], parts: tuple[str, ...] = tuple(MISMATCHES)) -> str:
        """Return what is wrong with the `metrics` of `split`; empty if their hashes fit the files in this folder."""
        if 'hashes' not in metrics:
            return 'were computed by an older version'
        predictions = self.predicted(split) if 'predictions' in parts else None
        current = hash_results(predictions, self.decision, metrics, self.path, parts)
        for part in parts:
            if metrics['hashes'].get(part) != current[part]:
                return MISMATCHES[part]
        return ''

    def _refuse(self, split: str, problem: str) -> None:
        if problem:
            raise UsageError(
                f'{self / "metrics.json"}: the metrics of {split} {problem}. Run `{self.evaluation(split)}` again.'
            )

    def check_decision(self) -> None:
        """Raise `UsageError` unless `decision.json` and the training are those that the metrics were computed with."""
        metrics = self.stored_metrics
        if not metrics and self.decision:
            raise UsageError(
                f'{self / "metrics.json"} is missing, so nothing shows that decision.json was not changed. '
                f'Run `{self.evaluation()}` again.'
            )
        for split, values in metrics.items():
            problem = self._find_mismatch(split, values, ('decision', 'training'))
            if problem == MISMATCHES['decision'] and not self.decision:
                problem = 'were computed with a decision, but decision.json is missing'
            self._refuse(split, problem)

    def evaluation(self, split: str | None = None) -> str:
        """Return the command that evaluates the run on `split`; by default on its test images, else on `valid`."""
        if split is None:
            has_items = (self / 'items.csv').is_file()
            split = 'valid' if has_items and 'test' not in set(self.items.split) else 'test'
        option = '' if split == 'test' else f' --split {split}'
        return f'cxr-fastai evaluate {quote(str(self.path))}{option}'

    def first_evaluation(self) -> str:
        """Return the command to evaluate the run for the first time: with a fixed threshold if none can be chosen."""
        has_recipe = (self / 'recipe.json').is_file()
        if has_recipe and self.recipe.valid == 'none' and not self.has_out_of_fold:
            return self.out_of_fold_evaluation()
        return self.evaluation() + (' --threshold fixed:0.5' if self.has_one_class else '')

    @property
    def has_one_class(self) -> bool:
        """Whether all validation images are of one class, so that no threshold can be chosen on them."""
        items = self.items if (self / 'items.csv').is_file() else None
        return items is not None and items[items.split == 'valid'].label.nunique() == 1

    def out_of_fold_evaluation(self) -> str:
        """Return the command that gives the run the out-of-fold predictions of a cross-validation."""
        return f'cxr-fastai evaluate {quote(str(self.path))} --out-of-fold FOLDS'

    def write_results(self, predictions: pd.DataFrame, metrics: dict[str, Any], decision: dict[str, Any]) -> None:
        """Write `predictions.csv`, `decision.json`, and last `metrics.json` with the hashes that bind them together.

        Whoever reads the metrics after a crash between the writes gets an error, and not metrics of something else.
        """
        write_csv(self / 'predictions.csv', predictions)
        write_json(self / 'decision.json', decision)
        for split, values in metrics.items():
            values['hashes'] = hash_results(predictions[predictions.split == split], decision, values, self.path)
        write_json(self / 'metrics.json', metrics)

    @property
    def robustness(self) -> pd.DataFrame:
        """One row per corruption and strength, for every split that was evaluated with `--robustness`."""
        return read_table(self / 'robustness.csv')

    def start(self, recipe: Recipe, items: pd.DataFrame) -> None:
        """Write the recipe and the items table of a training that is about to start."""
        write_csv(self / 'items.csv', items)
        write_json(self / 'recipe.json', asdict(recipe))  # last, because it turns the folder into a run

    def extend(self, recipe: Recipe) -> None:
        """Write the `recipe` of a training that is about to continue with further phases."""
        write_json(self / 'recipe.json', asdict(recipe))

    def write_split(self, name: str, table: pd.DataFrame, split: str) -> None:
        """Replace the rows of one `split` in the CSV file `name`, and keep the rows of other splits.

        Rows with other columns, which an earlier version wrote, are not kept; a `CXRWarning` names their splits.
        """
        import pandas as pd

        if (self / name).exists():
            previous = read_table(self / name)
            if set(previous) == set(table):
                table = pd.concat([previous[previous.split != split], table], ignore_index=True)
            else:
                self._warn_of_old_rows(name, set(previous.split) - {split})
        write_csv(self / name, table)

    def _warn_of_old_rows(self, name: str, splits: Set[str]) -> None:
        if splits:
            warnings.warn(
                f'{self / name}: an older version wrote the rows of {", ".join(sorted(splits))}, with other columns, '
                'so they are removed. Evaluate again what you need of them.',
                CXRWarning,
                stacklevel=4,
            )

    def remove_partial_files(self) -> None:
        """Delete the temporary files that killed commands left behind."""
        for name in (*TRAINING_FILES, *RESULT_FILES):
            sweep(self / name)

    def log_event(self, event: str, **facts: Any) -> None:
        """Append a line to `journal.jsonl`: the time, the `event` and its `facts`, which must not contain NaN."""
        if not is_main_process():
            return
        entry = {'time': datetime.now(UTC).isoformat(timespec='seconds'), 'event': event, **facts}
        line = json.dumps(entry, allow_nan=False) + '\n'
        journal = self / 'journal.jsonl'
        with writing(journal), open(journal, 'ab+') as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b'\n':  # a crash left half a line
                    file.write(b'\n')
            file.write(line.encode())

    def last_event(self, *events: str) -> dict[str, Any]:
        """Return the last line of `journal.jsonl` about one of the `events`; empty if there is none."""
        journal = self / 'journal.jsonl'
        if not journal.is_file():
            return {}
        last: dict[str, Any] = {}
        for line in read_text(journal, MAX_JOURNAL).splitlines():
            with suppress(CXRError):  # a crash may have left half a line
                entry = parse_json(line, journal)
                check_object(entry, JOURNAL, journal)
                if entry['event'] in events:
                    last = entry
        return last

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Prevent other processes from training into this folder. Raises `UsageError` if one already does."""
        from filelock import FileLock, Timeout

        if not is_main_process():
            yield
            return
        try:
            with FileLock(self / '.lock', timeout=0):
                yield
        except Timeout:
            raise UsageError(f'{self.path}: another process trains there. Wait until it ends, or stop it.') from None


def _describe_no_run(path: Path) -> str:
    """Return why `path`, which contains no recipe, is not a run, and how to get one."""
    if not path.exists() and (str(path) == PRETRAINED or str(path).startswith(HUB_PREFIX)):
        return f'{path}: a bundle, which has no training to work on. Name a run, which `cxr-fastai train` makes.'
    if not path.exists():
        return f'{path}: no such run folder. Check the name, or create one: `cxr-fastai train --out {path}`.'
    runs = sorted(recipe.parent.name for recipe in path.glob('*/recipe.json'))
    if runs:
        names = ', '.join(runs[:3]) + (', ...' if len(runs) > 3 else '')
        return f'{path} is a folder of runs and not a run itself. Name one of them: {names}.'
    if path.is_dir() and not any(path.iterdir()):
        return f'{path} is not a run folder: it is empty. Fill it: `cxr-fastai train --out {path}`.'
    return (
        f'{path} is not a run folder (it contains no recipe.json). Name a folder that `cxr-fastai train` wrote, and '
        'images with --data.'
    )


def as_run(run: Run | StrPath) -> Run:
    """Return `run`, or the run in a folder. Raises `UsageError` if it is not a run folder."""
    return run if isinstance(run, Run) else Run.open(run)


def read_recipe(path: StrPath) -> Recipe:
    """Return the recipe in the JSON file `path`, such as the `recipe.json` of a run.

    Raises `UsageError`, which names the field, if the file is missing, damaged, or not a recipe of this version.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f'{path}: no such file. Name the recipe.json of a run.')
    values = read_json(path)
    try:
        return parse_recipe(values)
    except UsageError as error:
        raise UsageError(
            f'{path}: not a recipe of this version: {str(error).rstrip(".")}. Use the recipe.json of a run of this '
            'version, or train again with the options of `cxr-fastai train`.'
        ) from None
