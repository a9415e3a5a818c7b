"""Train a series: the folds of a cross-validation, or several seeds, one after the other and resumable."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from cxr_fastai.core.files import StrPath, writing
from cxr_fastai.core.recipe import Recipe
from cxr_fastai.core.run import Run
from cxr_fastai.core.series import FOLDS, SEEDS, Series, has_ended
from cxr_fastai.data.items import read_recipe_items
from cxr_fastai.training.training import train

log = logging.getLogger(__name__)


def train_folds(recipe: Recipe, data: str | Path, out: StrPath, folds: int, **options: Any) -> Series:
    """Train a network for each of `folds` parts of the patients, and validate it on that part.

    Every image of train and valid is then a validation image of exactly one network, which was trained on none of that
    patient's images. The runs are `out/fold-0`, `out/fold-1` and so on; `options` are those of `train`. With the
    `precision` `auto`, the trial of the first training decides for all of them.

    Raises `CXRError` as `train` does. What was trained until then can be continued by `resume_series`.
    """
    return _train_missing(Series.create(out, FOLDS, folds, recipe), data, options)


def train_seeds(recipe: Recipe, data: str | Path, out: StrPath, seeds: int, **options: Any) -> Series:
    """Train networks that differ in the seed only, from that of `recipe` on; see `train_folds`.

    With `valid='patients'` the seed also chooses the validation patients.
    """
    return _train_missing(Series.create(out, SEEDS, seeds, recipe), data, options)


def resume_series(path: StrPath, data: str | Path, **options: Any) -> Series:
    """Continue the series in the folder `path`: an interrupted training first, then those that have not begun.

    Raises `CXRError` as `train` does.
    """
    return _train_missing(Series.open(path), data, options)


def _train_missing(series: Series, data: str | Path, options: dict[str, Any]) -> Series:
    for recipe in series.recipes.values():
        read_recipe_items(Path(data), recipe)  # raises before the first training if a later one has no images
    options = dict(options)
    precision = options.pop('precision', None)
    first = series.folder_of_first
    for number, (name, recipe) in enumerate(series.recipes.items(), 1):
        folder = series.folder(name)
        if has_ended(folder):
            log.info('%s: trained already', folder)
            continue
        log.info('%s: training %d of %d', folder, number, series.number)
        if folder == first:
            _train_one(folder, recipe, data, precision, options)
        else:
            _train_one(folder, replace(recipe, precision=Run.open(first).recipe.precision), data, None, options)
    return series


def _train_one(folder: Path, recipe: Recipe, data: str | Path, precision: str | None, options: dict[str, Any]) -> None:
    if (folder / 'recipe.json').is_file():
        train(Run.open(folder).recipe, data, folder, resume=True, **options)
        return
    if folder.exists():  # it was stopped before there was anything to continue
        with writing(folder):
            shutil.rmtree(folder)
    train(recipe, data, folder, precision=precision, **options)
