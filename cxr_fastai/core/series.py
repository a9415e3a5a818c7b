"""A series: several trainings of one recipe in one folder, one for each fold of the patients or for each seed.

The folder contains `series.json`, with the recipe and the number of trainings, and a run folder for each of them. A
series may be unfinished: `find_missing` returns the names of the trainings that have not ended.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cxr_fastai.core.errors import UsageError
from cxr_fastai.core.files import StrPath, check_new, write_json, writing
from cxr_fastai.core.foreign import read_json
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.recipe_fields import parse_recipe
from cxr_fastai.core.run import Run
from cxr_fastai.core.schemas import Anything, Choice, Integer, Text, check_object

SERIES = 'series.json'
FOLDS = 'folds'
SEEDS = 'seeds'
MIN_RUNS = 2
MAX_RUNS = 100
CONTENTS = {
    'kind': Choice((FOLDS, SEEDS)),
    'number': Integer(MIN_RUNS, MAX_RUNS),
    'recipe': Anything(),
    'images': Text(64),
    'precision': Text(10, optional=True),
    'compile': Text(10),
    'track': Text(100, optional=True),
}
"""The fields of `series.json`."""


@dataclass(frozen=True)
class Series:
    """A folder of a `number` of trainings of one `recipe`, of the `kind` `folds` or `seeds`.

    `images` is the identity of the images (`data.items.identify_images`). `precision`, `compile` and `track` are those
    of `training.train`.
    """

    path: Path
    kind: str
    number: int
    recipe: Recipe
    images: str
    precision: str | None = None
    compile: str = 'off'
    track: str | None = None

    @classmethod
    def open(cls, path: StrPath) -> Series:
        """Return the series in the folder `path`. Raises `UsageError` if it is none, or damaged."""
        path = Path(path)
        if not is_series(path):
            raise UsageError(
                f'{path}: not a series of trainings. Create one: `cxr-fastai train --folds 5 --out {path}`.'
            )
        facts = check_object(
            read_json(path / SERIES), CONTENTS, path / SERIES, 'Train again into another --out', UsageError
        )
        return cls(path, **facts | {'recipe': parse_recipe(facts['recipe'])})

    def create(self) -> None:
        """Create the folder with `series.json`. Raises `UsageError` if it is not empty."""
        check_new(self.path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        facts = asdict(self)
        del facts['path']
        write_json(self.path / SERIES, facts)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipe of each training, by the name of its run folder.

        Folds validate on one part of the patients after the other; seeds are consecutive.
        """
        if self.kind == FOLDS:
            recipe = replace(self.recipe, valid='patients', valid_pct=1 / self.number)
            return {f'fold-{fold}': replace(recipe, fold=fold) for fold in range(self.number)}
        first = self.recipe.seed
        return {f'seed-{seed}': replace(self.recipe, seed=seed) for seed in range(first, first + self.number)}

    def folder(self, name: str) -> Path:
        """Return the run folder of the training `name`."""
        return self.path / name

    @property
    def folder_of_first(self) -> Path:
        """The run folder of the first training."""
        return self.folder(list(self.recipes)[0])

    def find_missing(self) -> list[str]:
        """Return the names of the trainings that have not ended."""
        return [name for name in self.recipes if not Run(self.folder(name)).has_ended]

    def open_runs(self) -> list[Run]:
        """Return the runs, in order. Raises `UsageError` if some have not ended."""
        missing = self.find_missing()
        if missing:
            raise UsageError(
                f'{self.path}: {", ".join(missing)} of {self.number} trainings not finished. Continue: '
                f'`cxr-fastai train --resume {self.path}`.'
            )
        return [Run.open(self.folder(name)) for name in self.recipes]


def is_series(path: StrPath) -> bool:
    """Return whether the folder `path` contains a series."""
    return (Path(path) / SERIES).is_file()


def is_folds(path: StrPath) -> bool:
    """Return whether the folder `path` contains the folds of a cross-validation."""
    return is_series(path) and Series.open(path).kind == FOLDS
